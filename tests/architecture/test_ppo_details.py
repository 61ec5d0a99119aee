# SPDX-License-Identifier: Apache-2.0
"""docs/ppo_details.md has the settings of the code, with the defaults that they have."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from nemo_aligner.objectives.config import CreditConfig, PolicyConfig, ValueConfig

PAGE = Path(__file__).parents[2] / "docs/ppo_details.md"
ROW = re.compile(r"\| `([\w.]+)`(?: \(critic\))? \| `([^`]+)` \|")
SETTINGS = [
    (f"{block}.{field.name}", field.default)
    for block, config in (("trainer.ppo", CreditConfig), ("model.ppo", PolicyConfig), ("model", ValueConfig))
    for field in fields(config)
]


@pytest.mark.parametrize(("key", "default"), SETTINGS, ids=[key for key, _ in SETTINGS])
def test_every_setting_has_a_row_with_its_default(key: str, default: object):
    told = dict(ROW.findall(PAGE.read_text()))
    assert yaml.safe_load(told[key]) == default


def test_every_detail_of_both_lists_has_one_row():
    firsts = re.findall(r"^\| ([0-9EA, ]+) \|", PAGE.read_text(), re.MULTILINE)
    names = [name.strip() for first in firsts for name in first.split(",")]
    wanted = [
        *(str(n) for n in range(1, 38)),
        *(f"E{n}" for n in range(1, 10)),
        *(f"A{n}" for n in range(1, 5)),
    ]
    assert sorted(names) == sorted(wanted)
