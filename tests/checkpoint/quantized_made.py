"""A small model whose linears are quantised as other tools write it: packed by plain loops, from the formats
as they are published, so that nothing is shared with what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint import write_checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LAYER = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128),
    "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}
LINEARS = {f"model.layers.{n}.{name}": size for n in range(2) for name, size in LAYER.items()}
GATE = "model.layers.1.mlp.gate_proj"


@dataclass
class Packed:
    """leaves: what the checkpoint holds of a module, by the last part of the name
    weight: what they stand for"""

    leaves: dict[str, Tensor]
    weight: Tensor


Pack = Callable[[str, int, int, torch.Generator], Packed]


def others(generator: torch.Generator) -> dict[str, Tensor]:
    """All that is no linear of a layer."""
    tensors = {
        "model.embed_tokens.weight": torch.randn(301, 128, generator=generator) * 0.5,
        "model.norm.weight": 1 + 0.2 * torch.randn(128, generator=generator),
        "lm_head.weight": torch.randn(301, 128, generator=generator) * 128**-0.5,
    }
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 1 + 0.2 * torch.randn(128, generator=generator)
    return tensors


def make(
    folder: Path,
    quantization: dict[str, Any] | None,
    pack: Pack,
    *,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[Path, Path, dict[str, Tensor]]:
    """Two checkpoints, quantised and not, of the same model, and its weights by module.

    quantization: config.json's quantization_config; only: which modules are packed; change: of the packed
    tensors, before they are written
    """
    generator = torch.Generator().manual_seed(5)
    tensors, plain, weights = others(generator), others(torch.Generator().manual_seed(5)), {}
    for name, (out_size, in_size) in LINEARS.items():
        made = pack(name, out_size, in_size, generator)
        weights[name] = made.weight
        plain[f"{name}.weight"] = made.weight.float()
        leaves = made.leaves if only(name) else {"weight": made.weight.float()}
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    change(tensors)
    config = CONFIG if quantization is None else {**CONFIG, "quantization_config": quantization}
    write_checkpoint(folder / "quantised", config, tensors)
    write_checkpoint(folder / "plain", CONFIG, plain)
    return folder / "quantised", folder / "plain", weights


def random_scales(shape: tuple[int, ...], size: float, generator: torch.Generator) -> Tensor:
    return (0.5 + torch.rand(shape, generator=generator)) * size


def words(rows: list[list[int]], bits: int) -> Tensor:
    """Each row's integers, the first in the lowest bits of its first word -> int32 [rows, words]"""
    a_word, packed = 32 // bits, []
    for row in rows:
        line = []
        for begin in range(0, len(row), a_word):
            word = 0
            for place, value in enumerate(row[begin : begin + a_word]):
                word |= value << (bits * place)
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def integer_weight(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: list[int]) -> Tensor:
    """scale * (code - zero), by the group of each input. codes [out, in]; scales, zeros [groups, out]"""
    out_size, in_size = codes.shape
    weight = torch.empty(out_size, in_size, dtype=torch.float64)
    for i in range(in_size):
        group = group_of[i]
        weight[:, i] = scales[group].double() * (codes[:, i].double() - zeros[group].double())
    return weight


def awq(group_size: int) -> Pack:
    """AutoAWQ's WQLinear_GEMM: of eight outputs, nibble i of a word holds output order[i]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def shuffled(rows: list[list[int]]) -> list[list[int]]:
        return [[row[begin + place] for begin in range(0, len(row), 8) for place in order] for row in rows]

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> Packed:
        size = in_size if group_size == -1 else group_size
        groups = in_size // size
        codes = torch.randint(0, 16, (out_size, in_size), generator=generator)
        zeros = torch.randint(0, 16, (groups, out_size), generator=generator)
        scales = random_scales((groups, out_size), in_size**-0.5 / 6, generator).half()
        leaves = {
            "qweight": words(shuffled(codes.t().tolist()), 4),
            "qzeros": words(shuffled(zeros.tolist()), 4),
            "scales": scales,
        }
        return Packed(leaves, integer_weight(codes, scales, zeros, [i // size for i in range(in_size)]))

    return pack


def gptq(group_size: int, *, bits: int = 4, sym: bool = True, v2: bool = False, order: str = "none") -> Pack:
    """order: "none": no g_idx; "trivial": one in order; "act": a permuted one, the same for linears of an
    input; "own": each its own"""

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> Packed:
        size = in_size if group_size == -1 else group_size
        groups, top = in_size // size, 1 << bits
        codes = torch.randint(0, top, (out_size, in_size), generator=generator)
        zeros = torch.full((groups, out_size), top // 2)
        if not sym:
            zeros = torch.randint(0, top, (groups, out_size), generator=generator)
        scales = random_scales((groups, out_size), in_size**-0.5 / (0.4 * top), generator).half()
        group_of = [i // size for i in range(in_size)]
        if order in ("act", "own"):
            seed = sum(map(ord, name)) if order == "own" else in_size
            shuffle = torch.randperm(in_size, generator=torch.Generator().manual_seed(seed)).tolist()
            group_of = [group_of[i] for i in shuffle]
        qzeros = words(zeros.tolist(), bits)
        if not v2:  # GPTQModel takes one off every zero point of a word at once: one of 0 borrows
            qzeros -= 0x11111111 if bits == 4 else 0x01010101
        leaves = {
            "qweight": words(codes.tolist(), bits).t(),
            "qzeros": qzeros,
            "scales": scales,
        }
        if order != "none":
            leaves["g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        return Packed(leaves, integer_weight(codes, scales, zeros, group_of))

    return pack


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def nvfp4(*, shared: bool, divides: bool) -> Pack:
    """shared: linears of an input have one global scale; divides: as compressed-tensors, else as ModelOpt."""

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> Packed:
        codes = torch.randint(0, 16, (out_size, in_size), generator=generator).tolist()
        scales = random_scales((out_size, in_size // 16), 100.0, generator).to(torch.float8_e4m3fn)
        scales[0, 0] = 0.0  # of a block that is small against the rest
        one = torch.tensor([2.0**-12 * (1.0 if shared else 1 + sum(map(ord, name)) % 97 / 64)])
        weight = torch.empty(out_size, in_size, dtype=torch.float64)
        data = torch.empty(out_size, in_size // 2, dtype=torch.uint8)
        wide = scales.double().tolist()
        for o in range(out_size):
            for i in range(in_size):
                code = codes[o][i]
                sign = -1.0 if code & 8 else 1.0
                weight[o, i] = sign * E2M1[code & 7] * wide[o][i // 16] * float(one)
                if i % 2 == 0:
                    data[o, i // 2] = code | codes[o][i + 1] << 4
        if divides:
            leaves = {"weight_packed": data, "weight_scale": scales, "weight_global_scale": 1 / one}
        else:
            leaves = {"weight": data, "weight_scale": scales, "weight_scale_2": one.view(())}
            leaves["input_scale"] = torch.tensor(0.01)
        return Packed(leaves, weight)

    return pack


def fp8(by: str, leaf: str = "weight_scale", dtype: torch.dtype = torch.float32) -> Pack:
    """by: "tensor", "channel", "vector" (the same without a second dimension) or "block" """

    def pack(name: str, out_size: int, in_size: int, generator: torch.Generator) -> Packed:
        weight = (torch.randn(out_size, in_size, generator=generator) * 50).to(torch.float8_e4m3fn)
        shape = {
            "tensor": (),
            "channel": (out_size, 1),
            "vector": (out_size,),
            "block": (-(-out_size // 128), in_size // 128),
        }[by]
        scales = random_scales(shape, in_size**-0.5 / 50, generator).to(dtype)
        exact = weight.double()
        for o in range(out_size):
            if by == "block":
                for i in range(in_size):
                    exact[o, i] *= scales[o // 128, i // 128].double()
            else:
                exact[o] *= (scales if by == "tensor" else scales.flatten()[o]).double()
        leaves = {"weight": weight, leaf: scales, "input_scale": torch.tensor(0.02)}
        return Packed(leaves, exact)

    return pack
