# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies of a GPT, stretched as transformers stretches them; its results are the reference."""

import math

import torch
from torch import Tensor

from nemo_aligner.models.gpt.config import GPTConfig, RopeScaling


def inverse_frequencies(config: GPTConfig) -> Tensor:
    """[size / 2] float32: radians per position, of the pairs of the rotated part of a head."""
    # As transformers rounds: half of the rotated size, made even.
    size = int(config.head_dim * config.rotary_percentage) // 2 * 2
    periods = config.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / periods
    match scaling.rope_type:
        case "linear":
            return 1.0 / periods / scaling.factor
        case "llama3":
            return _llama3(1.0 / periods, scaling)
        case "yarn":
            return _yarn(periods, scaling, base=config.rotary_base)


def rotation_scale(config: GPTConfig) -> float:
    """The factor of cosines and sines: 1 but for yarn, which sharpens attention over long texts."""
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _growth(scaling.factor, scaling.mscale) / _growth(scaling.factor, scaling.mscale_all_dim)
    return _growth(scaling.factor, 1.0)


def _growth(factor: float, weight: float) -> float:
    """sqrt(1/t) of Peng 2023 (YaRN, arXiv 2309.00071), eq. 22, with DeepSeek's weight."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, between them a ramp."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def _yarn(periods: Tensor, scaling: RopeScaling, *, base: float) -> Tensor:
    """Frequencies of over ``beta_fast`` turns within the original context kept, of under ``beta_slow`` divided by
    the factor, between them a ramp over their numbers (Peng et al. 2023).
    """
    size = 2 * len(periods)

    def number(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # as transformers keeps the ramp finite
    keep = 1 - ((torch.arange(len(periods), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep
