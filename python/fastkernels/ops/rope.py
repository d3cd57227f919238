"""Rotary position embedding, alone and joined with the write to the KV cache."""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_key_offset,
    check_last_contiguous,
    check_range_in_debug,
    check_shape,
    register_mutating_fake,
    require,
)
from fastkernels.ops.kv_cache import check_cache

register_mutating_fake("rope", "rope_append_kv")


def _check_rope(
    op: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor
) -> None:
    check_dtype(op, "q", q, FLOAT_DTYPES)
    check_shape(op, "q", q, (None, None, None), "[num_tokens, num_q_heads, head_dim]")
    check_dtype(op, "k", k, (q.dtype,))
    words = "[num_tokens, num_kv_heads, head_dim], with the tokens and head_dim of q"
    check_shape(op, "k", k, (q.shape[0], None, q.shape[2]), words)
    check_dtype(op, "positions", positions, INDEX_DTYPES)
    check_shape(op, "positions", positions, (q.shape[0],), "[num_tokens]")
    check_dtype(op, "cos_sin", cos_sin, (torch.float32,))
    check_shape(op, "cos_sin", cos_sin, (None, None), "[max_position, rotary_dim]")
    max_position, rotary_dim = cos_sin.shape
    require(max_position > 0, f"{op}: cos_sin has no rows, but the op takes one a position")
    require(
        rotary_dim % 2 == 0 and rotary_dim <= q.shape[2],
        f"{op}: rotary_dim, the width of cos_sin, is {rotary_dim}, but the op takes an even number up to "
        f"head_dim, which is {q.shape[2]}",
    )
    check_device(op, q=q, k=k, positions=positions, cos_sin=cos_sin)
    check_last_contiguous(op, q=q, k=k)
    check_contiguous(op, positions=positions, cos_sin=cos_sin)
    check_range_in_debug(op, "positions", positions, 0, max_position, "the rows of cos_sin")


def _check_out(
    op: str, name: str, out: torch.Tensor | None, like: torch.Tensor, like_name: str
) -> torch.Tensor:
    """out checked against the tensor it is like, or a new one."""
    if out is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    out = as_tensor(out)
    check_dtype(op, name, out, (like.dtype,))
    check_shape(op, name, out, tuple(like.shape), f"the shape of {like_name}")
    check_device(op, **{like_name: like, name: out})
    check_last_contiguous(op, **{name: out})
    return out


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool = False,
    *,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns pairs (a, b) of a head by the angle of its token: a cos - b sin, b cos + a sin.

    q:         [num_tokens, num_q_heads, head_dim] bf16 | fp16 | fp32; last dimension contiguous, any stride
               of the others
    k:         [num_tokens, num_kv_heads, head_dim], dtype of q, with strides of its own
    positions: [num_tokens] int32 | int64, rows of cos_sin
    cos_sin:   [max_position, rotary_dim] fp32, contiguous: cosines in the first half of a row, sines in the
               second; rotary_dim is even and at most head_dim, the rest of a head is copied
    interleaved: False: pair i is dimensions i and i + rotary_dim / 2 (NeoX). True: 2 i and 2 i + 1 (GPT-J)
    q_out:     like q, may be q itself; allocated when None
    k_out:     like k, may be k itself; allocated when None
    Returns (q_out, k_out). Computes in fp32 and rounds once; bitwise repeatable; safe in a CUDA graph. A
    position outside the table takes its nearest row; with FASTKERNELS_DEBUG set it raises.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Su et al. 2021. Kernels: csrc/rope/rope.cu, rope.cpp
    """
    q, k, positions, cos_sin = as_tensor(q), as_tensor(k), as_tensor(positions), as_tensor(cos_sin)
    _check_rope("rope", q, k, positions, cos_sin)
    q_out = _check_out("rope", "q_out", q_out, q, "q")
    k_out = _check_out("rope", "k_out", k_out, k, "k")
    torch.ops.fastkernels.rope(q, k, positions, cos_sin, interleaved, q_out, k_out)
    return q_out, k_out


def rope_append_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_out: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """rope of q and k, then append_kv of the turned k and of v, in one kernel; k and v are not changed.

    q:            [num_tokens, num_q_heads, head_dim] bf16 | fp16 | fp32; last dimension contiguous, any
                  stride of the others
    k, v:         [num_tokens, num_kv_heads, head_dim], dtype of q, each with strides of its own
    positions:    [num_tokens] int32 | int64, rows of cos_sin
    cos_sin:      [max_position, rotary_dim] fp32, contiguous: cosines in the first half of a row, sines in
                  the second; rotary_dim is even and at most head_dim, the rest of a head is copied
    interleaved:  False: pair i is dimensions i and i + rotary_dim / 2 (NeoX). True: 2 i and 2 i + 1 (GPT-J)
    kv_cache:     [num_pages, 2, num_kv_heads, page_size, head_dim], dtype of q, float8_e4m3fn, float8_e5m2 or
                  int8, contiguous; changed in place
    slot_mapping: [num_tokens] int64, page * page_size + offset; -1 skips the token's k and v. The slots of a
                  call must differ
    q_out:        like q, may be q itself; allocated when None
    k_scale, v_scale: as in ``append_kv``
    k_offset:     fp32 [num_kv_heads, head_dim], contiguous, of a cache of one-byte elements: what is taken
                  off the turned k before it is divided by k_scale. Attention stays what it is, since all
                  scores of a query change alike; where it is the keys' mean, rounding them costs less
    Returns q_out. Computes in fp32 and rounds once; bitwise repeatable; safe in a CUDA graph. A position
    outside the table takes its nearest row and a slot past the cache is skipped; with FASTKERNELS_DEBUG set
    both raise.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Source: Su et al. 2021. Kernels: csrc/rope/rope_append_kv.cu, rope_append_kv.cpp
    """
    q, k, v, positions, cos_sin = (
        as_tensor(q),
        as_tensor(k),
        as_tensor(v),
        as_tensor(positions),
        as_tensor(cos_sin),
    )
    kv_cache, slot_mapping = as_tensor(kv_cache), as_tensor(slot_mapping)
    _check_rope("rope_append_kv", q, k, positions, cos_sin)
    check_cache("rope_append_kv", k, v, kv_cache, slot_mapping, k_scale, v_scale)
    check_device("rope_append_kv", q=q, kv_cache=kv_cache)
    check_key_offset("rope_append_kv", kv_cache, k_offset)
    q_out = _check_out("rope_append_kv", "q_out", q_out, q, "q")
    torch.ops.fastkernels.rope_append_kv(
        q, k, v, positions, cos_sin, interleaved, kv_cache, slot_mapping, q_out, k_scale, v_scale, k_offset
    )
    return q_out
