"""vLLM's quantised products, called as torch.ops._C, where they are at hand: Marlin, Machete, CUTLASS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Call

# vLLM's number of its scalar type uint4b8, codes of 0 to 15 that stand for -8 to 7
_UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
_MARLIN_SCALES = [i + 8 * j for i in range(8) for j in range(8)]  # of 64 rows, in the order it reads them


def cutlass(
    vllm: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    out: torch.Tensor,
) -> Call:
    """e4m3 or int8, scales a row of both: a [M, K], b [N, K], out [M, N]."""
    by_row, by_column = a_scales[:, None].contiguous(), b_scales[None, :].contiguous()
    return lambda: (vllm.cutlass_scaled_mm(out, a, b.t(), by_row, by_column, None), out)[1]


def int4_peers(vllm: Any, name: str) -> dict[str, Callable[[Any], Call]]:
    """Of int4 with groups of 128 without zero points, for inputs with x and the scheme's parts."""
    return {
        f"{name} Marlin": lambda i: _marlin(vllm, i.x, i.parts["packed"], i.parts["scales"]),
        f"{name} Machete": lambda i: _machete(vllm, i.x, i.parts["packed"], i.parts["scales"]),
    }


def _marlin(vllm: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> Call:
    (m, k), n = x.shape, len(packed)
    words = packed.view(torch.int32).t().contiguous()  # [K / 8, N]
    weight = vllm.gptq_marlin_repack(words, words.new_empty(0), k, n, 4, False)
    by_group = scales.t().reshape(-1, 64)[:, _MARLIN_SCALES].reshape(-1, n).contiguous().to(x.dtype)
    locks = words.new_zeros(torch.cuda.get_device_properties(x.device).multi_processor_count)
    before, after = (
        (x, None, weight, None, by_group, None, None, None, None, None, locks),
        (True, False, True, False),
    )
    return lambda: vllm.marlin_gemm(*before, _UINT4B8, m, n, k, *after)


def _machete(vllm: Any, x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> Call:
    weight = vllm.machete_prepack_B(packed.view(torch.int32).t(), x.dtype, _UINT4B8, x.dtype)
    by_group = scales.t().contiguous().to(x.dtype)
    return lambda: vllm.machete_mm(x, weight, _UINT4B8, None, by_group, None, 128, None, None, None)
