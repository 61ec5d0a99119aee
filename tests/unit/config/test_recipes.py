# SPDX-License-Identifier: Apache-2.0
"""The recipes of conf/recipe: each is a valid job whose settings all have an effect, and names its paper."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_aligner.launch.command import find_commands, load_script
from nemo_aligner.launch.script import compose
from nemo_aligner.settings import parse

SCRIPT = find_commands()["grpo"]
RECIPES = sorted((SCRIPT.parent / "conf/recipe").glob("*.yaml"))
NEEDED = (
    "pretrained_checkpoint.restore_from_path=model",
    "model.data.data_prefix={train: [prompts.jsonl]}",
    "trainer.ppo.rewards.rule.function=rules.score",
)
PAPERS = (Path(__file__).parents[3] / "docs/paper_index.md").read_text()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_job_of_its_paper(recipe: Path):
    script = load_script(SCRIPT)
    plain, job = (
        parse(OmegaConf.create(compose(script, [*NEEDED, *words])), script.kind)
        for words in ([], [f"recipe={recipe.stem}"])
    )
    job.check(1)
    assert job != plain
    assert job.trainer.ppo.idle == []
    (paper,) = re.findall(r"arXiv (\d+\.\d+)|\((Williams 1992)\)", recipe.read_text())
    assert "".join(paper) in PAPERS


def test_a_setting_beside_a_recipe_counts():
    script = load_script(SCRIPT)
    values = compose(script, [*NEEDED, "model.ppo.ratio_eps=0.1", "recipe=dapo"])
    assert (values["model"]["ppo"]["ratio_eps"], values["trainer"]["ppo"]["max_sampling_rounds"]) == (0.1, 10)
