# SPDX-License-Identifier: Apache-2.0
"""Packaging. The ranges are what the code is written for; constraints*.txt have the exact versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nemo_aligner/__init__.py").read_text(), re.MULTILINE)
assert VERSION, "nemo_aligner/__init__.py has no __version__ line"

setup(
    name="nemo-aligner",
    version=VERSION[1],
    description="Alignment of large language models on Megatron-core, on a GPU cluster or a laptop CPU.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["nemo_aligner", "nemo_aligner.*"]), "nemo_aligner.scripts"],
    # The command finds the scripts there where there is no source checkout.
    package_dir={"nemo_aligner.scripts": "examples/nlp/gpt"},
    package_data={"nemo_aligner.scripts": ["conf/*.yaml", "conf/_base/*.yaml", "conf/recipe/*.yaml"]},
    entry_points={"console_scripts": ["nemo-aligner = nemo_aligner.__main__:main"]},
    # parallel/ is written against these two releases of megatron-core: 0.16.1 is the newest for Python 3.11.
    # Python 3.13 waits for an nvidia-pytriton that takes numpy 2: numpy 1 has no wheels for it.
    python_requires=">=3.11,<3.13",
    install_requires=[
        "torch>=2.8,<3",
        'megatron-core>=0.16.1,<0.17; python_version < "3.12"',
        'megatron-core>=0.19.2,<0.20; python_version >= "3.12"',
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "transformers>=5.23,<6",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "sentencepiece>=0.2,<0.3",
        "aiohttp>=3.12,<4",
        "numpy>=1.26,<2",  # nvidia-pytriton needs numpy 1
        "psutil>=6",
        "rich>=13",
        "tensorboard>=2.18,<3",
        'nvidia-pytriton>=0.7,<0.8; sys_platform == "linux"',
    ],
    extras_require={
        "wandb": ["wandb>=0.19,<1"],
        "math": ["math-verify>=0.9,<1"],  # rewards by environments.mathematics
        "reasoning": ["reasoning-gym>=0.1.25,<0.2"],  # tasks of environments.reasoning
        # data sets of the hub; pyarrow 25 wants numpy 2
        "datasets": ["datasets>=4,<6", "pyarrow>=21,<25"],
        "gpu": ["transformer-engine[pytorch]>=2.6,<3"],
        "quickstart": ["matplotlib>=3.9,<4", "gguf>=0.17,<1"],
        "test": [
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "pytest-xdist>=3.8,<4",
            "wandb>=0.19,<1",
            "peft>=0.21,<1",
            "math-verify>=0.9,<1",
            "datasets>=4,<6",
            "pyarrow>=21,<25",
        ],
        # pyright's nodejs extra is a Node from PyPI, so that type checking needs no other download.
        "dev": [
            "ruff>=0.15,<1",
            "import-linter>=2.5,<3",
            "codespell>=2.4,<3",
            "pyright[nodejs]>=1.1.400,<2",
            "pre-commit>=4,<5",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
