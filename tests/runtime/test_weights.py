"""Weights of a plan: merged from a checkpoint, cast, made at random, and refused."""

from dataclasses import replace

import pytest
import torch

from fastkernels.checkpoint import CheckpointError
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.compiler import compile_model
from fastkernels.runtime.weights import load_weights, random_weights
from tests.checkpoints import make_checkpoint
from tests.compiler.configs import CONFIGS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path_factory.mktemp("weights"), "qwen2"))


def test_merged_weights_hold_their_sources(checkpoint):
    plan = compile_model(checkpoint.config)
    seen = []
    weights = load_weights(
        plan, checkpoint, device="cpu", dtype=torch.float32, progress=lambda *counts: seen.append(counts)
    )
    assert set(weights) == set(plan.weights)
    for part in ("weight", "bias"):
        sources = [checkpoint.tensor(f"model.layers.2.self_attn.{name}_proj.{part}") for name in "qkv"]
        assert torch.equal(weights[f"model.layers.2.self_attn.qkv_proj.{part}"], torch.cat(sources))
    assert seen[0] == (1, len(weights)) and seen[-1] == (len(weights), len(weights))


def test_weights_are_cast(checkpoint):
    plan = compile_model(checkpoint.config)
    weights = load_weights(plan, checkpoint, device="cpu", dtype=torch.bfloat16)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], checkpoint.tensor("lm_head.weight").bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"intermediate_size": 231},
            r"'model.layers.0.mlp.gate_proj.weight' has shape \[232, 160\]; config.json asks for \[231,",
        ),
        ({"num_layers": 4, "sliding_window": ()}, r"has no tensor 'model.layers.3.input_layernorm.weight'"),
        (
            {"num_layers": 2, "sliding_window": ()},
            r"holds the tensor 'model.layers.2.\S+' and 11 more, for which Qwen2ForCausalLM has no place",
        ),
    ],
    ids=["shape", "missing", "left over"],
)
def test_a_checkpoint_that_does_not_fit(checkpoint, change, message):
    plan = compile_model(replace(checkpoint.config, **change))
    with pytest.raises(CheckpointError, match=message):
        load_weights(plan, checkpoint, device="cpu", dtype=torch.float32)


def test_random_weights_have_the_shapes_and_repeat(device):
    plan = compile_model(CONFIGS["llama-biased"])
    first, second = (random_weights(plan, device=device, dtype=torch.bfloat16, seed=3) for _ in range(2))
    assert {name: tuple(weight.shape) for name, weight in first.items()} == {
        name: spec.shape for name, spec in plan.weights.items()
    }
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = random_weights(plan, device=device, dtype=torch.bfloat16, seed=4)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert abs(first["lm_head.weight"].float().std().item() - 160**-0.5) < 0.002
