# SPDX-License-Identifier: Apache-2.0
"""The experiments over seeds: what the page says of them is what the seeds found, and gates are checked."""

from pathlib import Path

import pytest

from benchmarks.learning import data, page
from benchmarks.learning.experiment import Experiment, Found, Gate, Job, load, store
from benchmarks.learning.recipes import EXPERIMENTS
from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.launch.ppo_jobs import plan_jobs, words_of_jobs
from nemo_aligner.launch.script import compose
from nemo_aligner.launch.words import full_words

GPT = Path(__file__).parents[3] / "examples/nlp/gpt"


def test_the_page_is_what_the_seeds_found():
    assert page.PAGE.read_text() == page.text({name: load(page.found_in(name)) for name in EXPERIMENTS})


def test_pictures_are_those_of_the_page():
    found = {f"{name}.svg" for name in EXPERIMENTS if load(page.found_in(name))}
    assert {path.name for path in page.PICTURES.iterdir()} == found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_all_that_was_found_passes_the_gates(name: str):
    experiment = EXPERIMENTS[name]
    for one in load(page.found_in(name)).values():
        assert set(one.curves) == set(experiment.figures)
        for gate in experiment.gates:
            assert abs(one.gates[gate.name] - gate.value) <= gate.within


def test_settings_of_all_commands_exist():
    def kind_of(script: str) -> type:
        return load_script(GPT / script).kind

    for experiment in EXPERIMENTS.values():
        names = {"DATA", "REAL", "SMOLLM2", "SEED", *(job.name.upper() for job in experiment.jobs)}
        for job in experiment.jobs:
            command, *words = job.words(dict.fromkeys(names, "x"))
            if command == "ppo":
                plan_jobs(words_of_jobs(words, kind_of), GPT)
            else:
                script = load_script(find_commands()[command])
                compose(script, full_words(words, script.kind))


def test_seeds_are_stored_beside_each_other(tmp_path):
    path = tmp_path / "found.json"
    found = Found(curves={"a": [(1, 2.0)]}, gates={"g": 1.0}, seconds=3600, processor="p")
    for seed in (2, 1):
        store(path, seed, found)
    assert load(path) == {1: found, 2: found}


def test_a_row_has_means_and_extremes(monkeypatch: pytest.MonkeyPatch):
    experiment = Experiment(
        title="A Title",
        about="",
        write_data=data.sums,
        jobs=(Job(name="a", command="sft"),),
        figures={"m": "meaning"},
        gates=(Gate(name="g", job="a", metric="m", value=1, within=0),),
    )
    monkeypatch.setattr(page, "EXPERIMENTS", {"a": experiment})
    seeds = {
        seed: Found(curves={"m": [(0, 0.1), (9, last)]}, gates={"g": 1.0}, seconds=1800, processor="p")
        for seed, last in ((1, 0.5), (2, 0.7))
    }
    written = page.text({"a": seeds})
    row = "| [a](#a-title) | meaning | 0.100 ± 0.000 (step 0) | 0.600 ± 0.141 (step 9) | 0.500 to 0.700 | 2 | 0.50 |"
    assert row in written.splitlines()
    assert "| g | 1.000000 | 1.000000 to 1.000000 |" in written.splitlines()
