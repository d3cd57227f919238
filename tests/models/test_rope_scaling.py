"""Rotary tables against transformers' frequencies, and the two layouts against complex multiplication."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fastkernels.config import ROPE_KINDS, ModelConfig, RopeKind, RopeScaling
from fastkernels.models.layers import RotaryEmbedding
from fastkernels.models.presets import preset
from fastkernels.models.rope_scaling import build_cos_sin
from tests.checkpoints import SIZES

TINY = ModelConfig.from_dict({**SIZES, "architectures": ["LlamaForCausalLM"]})


def test_the_whole_context_of_llama_3_equals_transformers() -> None:
    """Row by row to position 131,071, where a last-bit difference of a frequency would show."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = preset("llama-3.1-8b")
    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4096,
            num_attention_heads=32,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
    )
    positions = torch.cat([torch.arange(0, 131072, 517), torch.tensor([131071])])
    cos, sin = reference(torch.zeros(1), positions[None])
    expected = torch.cat([cos[0, :, :64], sin[0, :, :64]], dim=-1)
    table = build_cos_sin(config, 131072)
    assert table.shape == (131072, 128) and table.dtype == torch.float32
    assert torch.equal(table[positions], expected)


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_a_row_depends_on_its_position_alone(kind: RopeKind) -> None:
    config = replace(TINY, rope_scaling=RopeScaling(kind, 4.0, 32, attention_factor=1.1))
    long = build_cos_sin(config, 300)
    for max_position in (1, 32, 33, 150):
        assert torch.equal(build_cos_sin(config, max_position), long[:max_position])


def test_dynamic_grows_theta_from_the_trained_context_on() -> None:
    config = replace(TINY, rope_scaling=RopeScaling("dynamic", 2.0, 32))
    table = build_cos_sin(config, 64)
    assert torch.equal(table[:32], build_cos_sin(TINY, 32))
    dim = config.rotary_dim
    theta = 10000.0 * (2.0 * 50 / 32 - 1) ** (dim / (dim - 2))  # position 49 arrives at length 50
    expected = [math.cos(49 * theta ** (-2 * i / dim)) for i in range(dim // 2)]
    torch.testing.assert_close(table[49, : dim // 2], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_yarn_folds_the_attention_factor_in() -> None:
    plain = replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 32))
    scaled = replace(TINY, rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.25))
    assert torch.equal(build_cos_sin(scaled, 40), build_cos_sin(plain, 40) * 1.25)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [80, 40, 2])
def test_rotation_is_complex_multiplication(interleaved: bool, rotary_dim: int) -> None:
    config = replace(TINY, rotary_dim=rotary_dim, rope_interleaved=interleaved)
    rotary = RotaryEmbedding(config)
    rotary.build_table(60)
    positions = torch.tensor([0, 3, 59, 7])
    q, k = torch.randn(4, 5, 80), torch.randn(4, 2, 80)

    def expected(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        half = rotary_dim // 2
        if interleaved:
            real, imaginary = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
        else:
            real, imaginary = slice(0, half), slice(half, rotary_dim)
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / rotary_dim)
        turn = torch.polar(torch.ones(4, half).double(), positions.double()[:, None] * frequency)[:, None]
        turned = torch.complex(x[..., real], x[..., imaginary]) * turn
        x = x.clone()
        x[..., real], x[..., imaginary] = turned.real, turned.imag
        return x

    for actual, x in zip(rotary(positions, q, k), (q, k), strict=True):
        torch.testing.assert_close(actual.double(), expected(x), rtol=1e-4, atol=2e-5)
        assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:]), "the others are copied"
        assert torch.equal(actual[0], x[0]), "position 0 is no rotation"


def test_a_table_needs_a_position() -> None:
    with pytest.raises(ValueError, match="at least one position, not 0"):
        build_cos_sin(TINY, 0)
