# SPDX-License-Identifier: Apache-2.0
"""64 real pairs cost what TRL says: tokens, loss masks, log-probs of policy and reference, and losses at once."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nemo_aligner as na
from nemo_aligner.batch import ReferencedPairs
from nemo_aligner.data.collate import collate
from nemo_aligner.data.config import PairDataConfig
from nemo_aligner.data.datasets import open_response_rows
from nemo_aligner.data.text_rows import ResponseFiles, open_pairs
from nemo_aligner.objectives.config import DPOConfig
from nemo_aligner.objectives.preference import DPO
from nemo_aligner.objectives.protocol import ModelOutput
from nemo_aligner.parallel import world

# DPOTrainer of TRL 1.16.0 with beta 0.1 on the same pairs and models: the first eight losses, and the mean of all.
TRL = {
    "dpo": ([1.079877, 0.95219, 0.66953, 0.865824, 0.638707, 0.765164, 0.686072, 0.872023], 0.709162),
    "ipo": (
        [25.324091, 25.502453, 24.917332, 26.000107, 24.972698, 25.509851, 24.970684, 25.357054],
        25.072527,
    ),
}
PLAIN = DPOConfig(ref_policy_kl_penalty=0.1)
OBJECTIVES = {
    "dpo": DPO(PLAIN),
    "ipo": DPO(replace(PLAIN, preference_loss="ipo", preference_average_log_probs=True)),
}


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder with pairs.jsonl, of Anthropic's harmless dialogues, and two models: ref, and policy a little apart."""
    data = Path(os.environ.get("NEMO_ALIGNER_TEST_DATA", "/absent"))
    if not (data / "hh_harmless.jsonl.gz").exists():
        pytest.skip(
            "NEMO_ALIGNER_TEST_DATA names no folder with hh_harmless.jsonl.gz, which is optional data"
        )
    rows = []
    for line in gzip.decompress((data / "hh_harmless.jsonl.gz").read_bytes()).decode().splitlines():
        chosen, rejected = (json.loads(line)[key] for key in ("chosen", "rejected"))
        border = chosen.rfind("\n\nAssistant:") + len("\n\nAssistant:")
        if (
            chosen[:border] == rejected[:border]
            and chosen != rejected
            and max(map(len, (chosen, rejected))) <= 500
        ):
            rows.append({"prompt": chosen[:border], "chosen": chosen[border:], "rejected": rejected[border:]})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:64]))
    model = AutoModelForCausalLM.from_pretrained(data / "stories260k_hf", dtype=torch.float32)
    for name in ("ref", "policy"):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(data / "stories260k_hf").save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    return tmp_path


def test_real_pairs_cost_what_trl_says(real: Path):
    with world.ensure_single_process():
        policy, reference = (na.load(real / name) for name in ("policy", "ref"))
        data = PairDataConfig(data_prefix={"train": [str(real / "pairs.jsonl")]}, append_eod=True)
        rows = open_response_rows(
            data,
            data.splits.train,
            policy.tokenizer,
            files=ResponseFiles(open=open_pairs, unit="pairs"),
            max_length=512,
            generates=True,
        )
        found: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
        for i in range(len(rows)):
            batch = collate([rows[i]], pad_id=policy.tokenizer.pad_id, seq_length=rows[i].num_tokens)
            given, wanted = (
                model.learner.logprobs(batch, loss_tokens_only=True) for model in (policy, reference)
            )
            batch = batch.extended(ReferencedPairs, reference_sums=batch.per_sequence(wanted))
            for name, objective in OBJECTIVES.items():
                found[name].append(float(objective(ModelOutput(logprobs=given), batch)[0]))
    assert len(rows) == 64
    for name, (first, mean) in TRL.items():
        # Sums of hundreds of log-probs in float32.
        assert found[name][:8] == pytest.approx(first, rel=5e-5)
        assert sum(found[name]) / 64 == pytest.approx(mean, rel=1e-5)
