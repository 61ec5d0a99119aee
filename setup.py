# SPDX-License-Identifier: Apache-2.0
"""The packages; pyproject.toml has all else."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nemo_aligner", "nemo_aligner.*"]), "nemo_aligner.scripts"],
    # The command finds the scripts there where there is no source checkout.
    package_dir={"nemo_aligner.scripts": "examples/nlp/gpt"},
    package_data={"nemo_aligner.scripts": ["conf/*.yaml", "conf/_base/*.yaml", "conf/recipe/*.yaml"]},
)
