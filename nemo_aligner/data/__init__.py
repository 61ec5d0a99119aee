# SPDX-License-Identifier: Apache-2.0
"""JSONL files to batches of tokens. Rank and size are arguments: nothing here talks to other ranks."""
