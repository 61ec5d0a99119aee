# SPDX-License-Identifier: Apache-2.0
"""Losses as pure functions on tensors: no Megatron, no process groups, no configuration files."""
