# SPDX-License-Identifier: Apache-2.0
"""What the documents promise exists: make targets, scripts, settings of commands, linked files."""

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nemo_aligner.launch.command import OWN, find_commands, load_script
from nemo_aligner.launch.ppo_jobs import plan_jobs, words_of_jobs
from nemo_aligner.launch.script import Script, compose
from nemo_aligner.launch.words import full_words

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SCRIPTS = ROOT / "examples/nlp/gpt"
MAX_HELP_WORDS = 12


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path):
    named = set(re.findall(r"(?:`|^ *|&& )make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_scripts_exist(page: Path):
    scripts = re.findall(r"\bpython (\S+\.py)", page.read_text())
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's blocks of bash."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            yield shlex.split(line, comments=True)


def runs_of(command: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """(script, its settings) of each job that a command starts, whatever starts the command."""
    start = next(
        (i for i, word in enumerate(command) if word == "nemo-aligner" or word.endswith(".py")), None
    )
    if start is None:
        return
    words, short = list(command[start + 1 :]), command[start] == "nemo-aligner"
    name = words.pop(0) if short and words else ""
    assert not short or name in find_commands() or name in OWN or "-" in name[:1], f"no command {name}"
    path = find_commands().get(name) if short else ROOT / command[start]
    if path is None or path.parent != SCRIPTS:
        return
    words = [word for word in words if "=" in word and not word.startswith("--")]
    if path.name == "run_ppo.py":
        if short:
            words = words_of_jobs(words, lambda file: load_script(SCRIPTS / file).kind)
        actor, servers = plan_jobs(words, SCRIPTS)
        yield from ((Path(job.command[2]), list(job.command[3:])) for job in (actor, *servers))
    elif isinstance(script := load_script(path), Script):
        yield path, full_words(words, script.kind) if short else words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_of_commands_exist(page: Path):
    for command in commands(page):
        for path, words in runs_of(command):
            compose(load_script(path), words)


@pytest.mark.parametrize(
    ("command", "scripts"),
    [
        (
            "srun -N 2 .venv/bin/python -u examples/nlp/gpt/train_gpt_sft.py trainer.devices=2",
            ["train_gpt_sft"],
        ),
        ("A=1 python examples/nlp/gpt/train_gpt_dpo.py --config my.yaml", ["train_gpt_dpo"]),
        (
            "python examples/nlp/gpt/run_ppo.py critic.name=a actor.name=b reward.rm_model_file=c",
            ["train_gpt_ppo_actor", "serve_ppo_critic", "serve_reward_model"],
        ),
        ("nemo-aligner ppo model=a lr=1", ["train_gpt_ppo_actor", "serve_ppo_critic"]),
        ("nemo-aligner import model=a out=b", []),
    ],
)
def test_the_jobs_of_a_command_are_found(command: str, scripts: list[str]):
    assert [path.stem for path, _ in runs_of(shlex.split(command))] == scripts


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path):
    folders = ("", "nemo_aligner", "examples/nlp/gpt")
    named = [path for path in re.findall(r"`([\w.]+(?:/[\w.]+)+\.(?:py|yaml))`", page.read_text())]
    # An algorithm that the reader is to add is called foo.
    missing = [path for path in named if not any((ROOT / folder / path).is_file() for folder in folders)]
    assert [path for path in missing if "foo" not in path] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    missing = [
        link
        for link in links
        if not (ROOT / link.lstrip("/") if link.startswith("/") else page.parent / link).exists()
    ]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_headings(page: Path):
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", page.read_text())
    targets = [
        (ROOT / file.lstrip("/") if file.startswith("/") else page.parent / file if file else page, anchor)
        for file, anchor in links
    ]
    assert [anchor for target, anchor in targets if anchor not in anchors(target)] == []


def test_every_cited_paper_is_in_the_index():
    index = (ROOT / "docs/paper_index.md").read_text()
    cited = {
        (number, path.name)
        for path in (ROOT / "nemo_aligner").rglob("*.py")
        for number in re.findall(r"arXiv\s+(\d{4}\.\d{5})", path.read_text())
    }
    assert len(cited) > 10
    rows = [line for line in index.splitlines() if line.startswith("|")]
    missing = [pair for pair in sorted(cited) if not any(pair[0] in row and pair[1] in row for row in rows)]
    assert missing == []


def test_every_paper_of_the_index_is_cited_where_it_says():
    rows = (ROOT / "docs/paper_index.md").read_text().splitlines()
    missing = [
        (number, file)
        for row in rows
        for number in re.findall(r"abs/(\d{4}\.\d{5})", row)
        for file in re.findall(r"`(\w+(?:/\w+)+\.py)`", row)
        if number not in (ROOT / "nemo_aligner" / file).read_text()
    ]
    assert missing == []


def test_each_target_has_a_short_help():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    helps = dict(re.findall(r"^([a-z-]+):.*## (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert phony
    assert set(phony[1].split()) == set(helps)
    assert [target for target, text in helps.items() if len(text.split()) > MAX_HELP_WORDS] == []


def test_pins_cover_what_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    asked = [re.match(r"[a-zA-Z0-9-]+", line)[0] for line in lines]
    assert [package for package in asked if package.lower() not in _pins("constraints.txt")] == []


def test_pins_of_the_two_pythons_differ_in_megatron_alone():
    one, other = _pins("constraints.txt"), _pins("constraints-py312.txt")
    assert one.pop("megatron-core") == "0.16.1"
    assert other.pop("megatron-core") == "0.19.2"
    assert one == other


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return {name.lower(): version for name, _, version in (s.partition("==") for s in lines) if version}
