# SPDX-License-Identifier: Apache-2.0
"""Alignment of large language models on Megatron-core. Importing the package has no side effects."""

__version__ = "0.8.0"
