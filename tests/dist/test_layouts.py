# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on the layout: one rank is the oracle, 8 gloo ranks are cut in many ways."""

from dataclasses import asdict
from pathlib import Path

import fork
import pytest
import torch
import worker
import yaml
from known_weights import randomize
from objective_cases import OBJECTIVES, VOCAB, ObjectiveCase, found_in_package
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from nemo_aligner.checkpoint.convert import export_to_huggingface
from nemo_aligner.checkpoint.sharded import save_model
from nemo_aligner.checkpoint.weights import WeightReader
from nemo_aligner.models.gpt.model import build_gpt
from nemo_aligner.parallel import world
from nemo_aligner.parallel.ranks import Layout
from nemo_aligner.run.metrics import means

pytestmark = pytest.mark.timeout(960)  # all cases run before the first test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Oracle curves of one rank and, from the same saved weights, what 8 ranks make of every case."""
    out = tmp_path_factory.mktemp("layouts")
    with world.ensure_single_process():
        for oracle in dict.fromkeys(case.oracle for case in (*worker.CASES, *worker.OBJECTIVE_CASES)):
            weights = out / oracle.weights
            if not weights.exists():
                head = OBJECTIVES[oracle.objective].head
                model = build_gpt(worker.config(tied=oracle.tied), Layout(), torch.float32, head=head)
                randomize(model)
                save_model(model, weights)
            torch.save(worker.train(worker.loaded(oracle, weights), oracle, range(3)), out / f"{oracle}.pt")
        torch.save(worker.logits(worker.Case(), out / "weights-tied-True"), out / "logits-oracle.pt")
    (out / "saved").mkdir()
    (out / "saved/model_config.yaml").write_text(yaml.safe_dump(asdict(worker.config(tied=True))))
    fork.run_script(worker.__file__, out, ranks=8)
    return out


def losses(curve: dict) -> list[float]:
    return [step["loss"] for step in curve["steps"]]


def norms(curve: dict) -> list[float]:
    return [step["grad_norm"] for step in curve["steps"]]


def test_every_objective_is_tried():
    """An objective that is added to the package is added to OBJECTIVES."""
    assert {type(case.objective) for case in OBJECTIVES.values()} == found_in_package()


def comparable(case: ObjectiveCase, step: int, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, with the variance of rewards for their deviation, the root of a difference.

    Of a reward model's pairs from the second step on without the constant that rewards share: their losses have no
    gradient by it but for rounding, of which Adam makes whole steps.
    """
    found = dict(metrics)
    if "rewards_all_std" in found:
        found["variance"] = found.pop("rewards_all_std") ** 2
    if not (case.head and case.pairs):
        return found
    found["margin"] = metrics["rewards_chosen_mean"] - metrics["rewards_rejected_mean"]
    return {name: value for name, value in found.items() if step == 0 or not name.startswith("rewards_")}


@pytest.mark.parametrize("case", [*worker.CASES, *worker.OBJECTIVE_CASES], ids=str)
def test_metrics_and_grad_norms_are_one_ranks(folder: Path, case: worker.Case):
    subject = OBJECTIVES[case.objective]
    curve, oracle = torch.load(folder / f"{case}.pt"), torch.load(folder / f"{case.oracle}.pt")
    named = {"grad_norm", *means(dict.fromkeys(subject.objective.metrics, (0.0, 1.0)))}
    pairs = list(enumerate(zip(curve["steps"], oracle["steps"], strict=True)))
    if case.overlap:
        # A validation before the second step has seen the first one's weights, gathered late or not.
        (validation,) = curve["validation"]
        pairs.append((1, (validation | {"grad_norm": oracle["steps"][1]["grad_norm"]}, oracle["steps"][1])))
    for step, (ours, theirs) in pairs:
        assert set(ours) == named
        wanted = comparable(subject, step, theirs)
        assert comparable(subject, step, ours) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert curve["agree"]


@pytest.mark.parametrize("case", worker.BF16, ids=str)
def test_bf16_is_fp32_within_a_bound(folder: Path, case: worker.Case):
    """bf16 has 8 bits: losses of 3 steps within 0.2 %, whatever the layout; grad norms within 1 %."""
    curve, oracle = torch.load(folder / f"{case}.pt"), torch.load(folder / f"{case.oracle}.pt")
    assert losses(curve) == pytest.approx(losses(oracle), rel=2e-3)
    assert norms(curve) == pytest.approx(norms(oracle), rel=1e-2)
    assert curve["agree"]


def test_a_local_count_would_be_seen(folder: Path):
    curve, oracle = (
        torch.load(folder / f"{case}.pt") for case in (worker.LOCAL_COUNT, worker.LOCAL_COUNT.oracle)
    )
    assert norms(curve) != pytest.approx(norms(oracle), rel=1e-2)


@pytest.mark.parametrize("case", worker.RELOADED, ids=str)
def test_weights_saved_at_tp2_pp2_give_the_same_logits_everywhere(folder: Path, case: worker.Case):
    saved = torch.load(folder / f"logits-{worker.RELOADED[0]}-dp0.pt")
    for path in folder.glob(f"logits-{case}-dp*.pt"):
        found = torch.load(path)
        if case.tp == worker.RELOADED[0].tp and not case.sp:
            assert torch.equal(found, saved)
        torch.testing.assert_close(found, saved, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saved, torch.load(folder / "logits-oracle.pt"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", worker.AGAIN, ids=str)
def test_weights_saved_at_a_layout_are_those_that_were_loaded(
    folder: Path, case: worker.Case, tmp_path: Path
):
    before, after = (
        WeightReader(path)
        for path in (folder / f"weights-tied-{case.tied}", folder / f"again-{case}/model_weights")
    )
    assert set(before.shapes) == set(after.shapes)
    for name in before.shapes:
        # How many rows pad the vocabulary is the layout's.
        rows = VOCAB if "embedding" in name or "output_layer" in name else None
        assert torch.equal(before.read(name)[:rows], after.read(name)[:rows]), name
    if not case.tied:
        return
    exported = []
    for saved in (folder / f"weights-tied-{case.tied}", folder / f"again-{case}/model_weights"):
        archive = tmp_path / saved.parent.name
        archive.mkdir()
        (archive / "model_weights").symlink_to(saved)
        (archive / "model_config.yaml").write_text(yaml.safe_dump(asdict(worker.config(tied=True))))
        export_to_huggingface(archive, tmp_path / f"{archive.name}-hf")
        exported.append(load_file(tmp_path / f"{archive.name}-hf/model.safetensors"))
    assert exported[0].keys() == exported[1].keys()
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_weights_saved_at_tp2_pp2_give_the_same_logits_in_transformers(folder: Path, tmp_path: Path):
    export_to_huggingface(folder / "saved", tmp_path / "huggingface")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "huggingface")
    with torch.no_grad():
        found = model(worker.rows_for_logits().tokens).logits
    torch.testing.assert_close(found, torch.load(folder / "logits-oracle.pt"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", worker.RESUMED, ids=str)
def test_training_goes_on_at_another_layout(folder: Path, case: worker.Case):
    found, undisturbed = torch.load(folder / f"resumed-{case}.pt"), torch.load(folder / "undisturbed.pt")
    assert losses(found) == pytest.approx(losses(undisturbed), rel=1e-5)
    if worker.RESUMED[case] == case.layout.model_size and case.tp == worker.SAVED.tp:
        # Only the pipeline has changed.
        assert losses(found) == losses(undisturbed)


def test_draws_are_a_function_of_seed_step_and_place(folder: Path):
    found = [torch.load(path) for path in sorted(folder.glob("draws-*.pt"))]
    assert len(found) == 8
    alike, apart = {}, set()
    for rank in found:
        first, again, next_step = rank["draws"]
        assert first == again
        assert not set(first) & set(next_step)
        tp, *replica_and_stage = rank["place"]
        alike.setdefault(tuple(replica_and_stage), set()).add(first[0])
        apart.add((tp, first[1]))
    # Tensor parallel ranks draw alike outside of split regions and apart within; all others draw apart.
    assert len(alike) == 4
    assert all(len(draws) == 1 for draws in alike.values())
    assert len(set.union(*alike.values())) == 4
    assert len({draw for _, draw in apart}) == 8
