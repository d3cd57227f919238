"""The paged KV cache of a layer: [num_pages, 2, num_kv_heads, page_size, head_dim], 0 is K, 1 is V."""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    BYTE_DTYPES,
    FLOAT_DTYPES,
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_range_in_debug,
    check_scales,
    check_shape,
    register_mutating_fake,
)

register_mutating_fake("append_kv")


def check_cache(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """What append_kv and rope_append_kv take to write k and v into the cache."""
    check_dtype(op, "k", k, FLOAT_DTYPES)
    check_shape(op, "k", k, (None, None, None), "[num_tokens, num_kv_heads, head_dim]")
    check_dtype(op, "v", v, (k.dtype,))
    check_shape(op, "v", v, tuple(k.shape), "the shape of k")
    check_dtype(op, "kv_cache", kv_cache, (k.dtype, *BYTE_DTYPES))
    words = "[num_pages, 2, num_kv_heads, page_size, head_dim], with the heads and head_dim of k"
    check_shape(op, "kv_cache", kv_cache, (None, 2, k.shape[1], None, k.shape[2]), words)
    check_dtype(op, "slot_mapping", slot_mapping, (torch.int64,))
    check_shape(op, "slot_mapping", slot_mapping, (k.shape[0],), "[num_tokens]")
    check_device(op, k=k, v=v, kv_cache=kv_cache, slot_mapping=slot_mapping)
    check_last_contiguous(op, k=k, v=v)
    check_contiguous(op, kv_cache=kv_cache, slot_mapping=slot_mapping)
    check_scales(op, kv_cache, k_scale, v_scale)
    num_slots = kv_cache.shape[0] * kv_cache.shape[3]
    check_range_in_debug(
        op, "slot_mapping", slot_mapping, -1, num_slots, "the cache's slots, and -1 to skip,"
    )


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes the k and v of every token into its slot of the cache: bit for bit, or rounded to bytes.

    k:            [num_tokens, num_kv_heads, head_dim] bf16 | fp16 | fp32; last dimension contiguous, any
                  stride of the others
    v:            like k, with strides of its own
    kv_cache:     [num_pages, 2, num_kv_heads, page_size, head_dim], dtype of k, float8_e4m3fn, float8_e5m2 or
                  int8, contiguous; changed in place
    slot_mapping: [num_tokens] int64, page * page_size + offset; -1 skips the token. The slots of a call must
                  differ
    k_scale, v_scale: fp32 [num_kv_heads], of a cache of one-byte elements: k / k_scale is rounded to nearest,
                  ties to even, and saturated (int8: within 127; NaN becomes 0). 1 when None
    Returns kv_cache. Safe in a CUDA graph. A slot past the cache is skipped; with FASTKERNELS_DEBUG set it
    raises.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/kv_cache/append_kv.cu, append_kv.cpp
    """
    k, v, kv_cache, slot_mapping = as_tensor(k), as_tensor(v), as_tensor(kv_cache), as_tensor(slot_mapping)
    check_cache("append_kv", k, v, kv_cache, slot_mapping, k_scale, v_scale)
    torch.ops.fastkernels.append_kv(k, v, kv_cache, slot_mapping, k_scale, v_scale)
    return kv_cache
