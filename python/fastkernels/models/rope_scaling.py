"""Rotary tables: cos and sin of position x frequency, one function for each way of stretching the context.

Each function returns an fp32 table [max_position, rotary_dim]: row p holds cos of the rotary_dim / 2 angles
of position p, then their sin. A row depends on its position alone, never on the length of the prompt it came
in, so chunked prefill, batching and decoding one token at a time all see the same rotation.

Frequencies and angles are computed in fp32 in the order transformers computes them: at position 100,000 a
last-bit difference of a frequency is a visible angle, and the models were trained with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkernels.config import ModelConfig, RopeKind

_BLOCK_POSITIONS = 4096


def build_cos_sin(config: ModelConfig, max_position: int) -> Tensor:
    """The table of ``config.rope_scaling``: fp32 [max_position, rotary_dim] on the CPU.

    Raises ValueError when max_position is below 1.
    """
    if max_position < 1:
        raise ValueError(f"a rotary table needs at least one position, not {max_position}")
    with torch.device("cpu"):  # values are wanted even where the model is being made on the meta device
        return TABLES[config.rope_scaling.kind](config, max_position)


def default(config: ModelConfig, max_position: int) -> Tensor:
    """theta^(-2i / rotary_dim). Source: Su et al. 2021, RoFormer."""
    return _table(_fixed(_inverse_frequencies(config)), max_position)


def linear(config: ModelConfig, max_position: int) -> Tensor:
    """Every frequency divided by factor. Source: Chen et al. 2023, position interpolation."""
    return _table(_fixed(_inverse_frequencies(config) / config.rope_scaling.factor), max_position)


def dynamic(config: ModelConfig, max_position: int) -> Tensor:
    """NTK-aware: theta grows with the sequence once it is longer than the trained context.

    Row p uses the theta of the length max(p + 1, trained context). That equals transformers for every prompt
    up to the trained context and for decoding beyond it with a cache, where each token is rotated by the
    length at which it arrived. transformers rotates a prompt longer than the trained context wholly by its
    final length; a table by position does not, and that is what keeps the result independent of how the
    prompt is cut into chunks.
    Source: the NTK-aware scaling described by bloc97 and emozilla, 2023; Peng et al. 2023, section 3.
    """
    scaling, dim = config.rope_scaling, config.rotary_dim
    trained = scaling.original_max_position_embeddings
    frequency = _inverse_frequencies(config)

    def angles(positions: Tensor) -> Tensor:
        length = positions[:, None] + 1
        stretch = scaling.factor * length / trained - (scaling.factor - 1)
        theta = config.rope_theta * stretch.clamp(min=1) ** (dim / (dim - 2))  # [positions, 1]
        grown = 1.0 / theta ** _exponents(dim)
        return positions[:, None].float() * torch.where(length > trained, grown, frequency)

    return _table(angles, max_position)


def llama3(config: ModelConfig, max_position: int) -> Tensor:
    """Frequencies that turn often within the trained context stay, rare ones are divided by factor, and those
    between high_freq_factor and low_freq_factor turns are blended. Source: Llama 3.1's released
    configuration.
    """
    scaling = config.rope_scaling
    frequency = _inverse_frequencies(config)
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequency / scaling.factor + blend * frequency
    scaled = torch.where(turns < scaling.low_freq_factor, frequency / scaling.factor, blended)
    return _table(_fixed(torch.where(turns > scaling.high_freq_factor, frequency, scaled)), max_position)


def yarn(config: ModelConfig, max_position: int) -> Tensor:
    """A ramp over dimensions, from unscaled (beta_fast turns or more) to divided by factor (beta_slow or
    fewer); cos and sin are multiplied by attention_factor. Source: Peng et al. 2023, YaRN.
    """
    scaling, dim = config.rope_scaling, config.rotary_dim

    def dimension_of(num_turns: float) -> float:
        """The dimension whose frequency makes num_turns over the trained context."""
        context = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return dim * math.log(context) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # a step, without a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    powers = config.rope_theta ** _exponents(dim)
    frequency = 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
    return _table(_fixed(frequency), max_position, scaling.attention_factor)


TABLES: dict[RopeKind, Callable[[ModelConfig, int], Tensor]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
}


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2).float() / dim


def _inverse_frequencies(config: ModelConfig) -> Tensor:
    return 1.0 / (config.rope_theta ** _exponents(config.rotary_dim))


def _fixed(inverse_frequencies: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda positions: positions.float()[:, None] * inverse_frequencies


def _table(angles: Callable[[Tensor], Tensor], max_position: int, factor: float = 1.0) -> Tensor:
    """Rows for angles(positions [n]) -> [n, rotary_dim / 2].

    Always in whole blocks: the last elements of an array, and those where two threads meet, take a scalar
    path that rounds otherwise, and a row must not change with max_position.
    """
    blocks = []
    for first in range(0, max_position, _BLOCK_POSITIONS):
        block = angles(torch.arange(first, first + _BLOCK_POSITIONS))
        blocks.append(torch.cat([block.cos(), block.sin()], dim=-1) * factor)
    return torch.cat(blocks)[:max_position]
