"""The paged KV cache of a layer: [num_pages, 2, num_kv_heads, page_size, head_dim], 0 is K, 1 is V."""

from __future__ import annotations

from collections.abc import Sequence

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
    dtype_name,
    register_mutating_fake,
    require,
)

register_mutating_fake("append_kv", "copy_pages")

COPY_PAGES_MAX_LAYERS = 128


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


def copy_pages(
    caches: Sequence[torch.Tensor],
    from_pages: torch.Tensor,
    to_pages: torch.Tensor,
    *,
    from_caches: Sequence[torch.Tensor] | None = None,
) -> None:
    """caches[layer][to_pages[i]] = from_caches[layer][from_pages[i]], for every layer and i, in one launch.

    Within the caches it is the copy of copy-on-write; from or to a cache in pinned host memory it is the swap
    of a sequence's pages to the host and back. The GPU reads and writes the host's memory itself, and the
    call returns before it has.

    caches:      1 to 128 tensors [num_pages, ...], one a layer, alike in shape, dtype and device, contiguous;
                 changed in place. For CUDA page numbers they may lie in pinned host memory
    from_pages:  [num_pairs] int32, on the CPU, or on the GPU
    to_pages:    like from_pages. No page may be in it twice, or be both read and written
    from_caches: like caches, num_pages and device may differ; caches when None
    Safe in a CUDA graph. A pair with a page that does not exist, such as -1, is skipped.
    Raises ValueError for a number of tensors, shape, dtype, stride or device it does not take, naming what it
    does, and for host memory that is not pinned.
    Kernels: csrc/kv_cache/copy_pages.cu, copy_pages.cpp
    """
    caches = [as_tensor(x) for x in caches]
    sources = caches if from_caches is None else [as_tensor(x) for x in from_caches]
    from_pages, to_pages = as_tensor(from_pages), as_tensor(to_pages)
    require(
        1 <= len(caches) <= COPY_PAGES_MAX_LAYERS,
        f"copy_pages: {len(caches)} caches are given, but the op takes 1 to {COPY_PAGES_MAX_LAYERS}",
    )
    require(
        len(sources) == len(caches),
        f"copy_pages: {len(sources)} from_caches are given for {len(caches)} caches",
    )
    for name, pages in (("from_pages", from_pages), ("to_pages", to_pages)):
        check_dtype("copy_pages", name, pages, (torch.int32,))
        check_shape(
            "copy_pages", name, pages, (from_pages.shape[0] if from_pages.dim() else None,), "[num_pairs]"
        )
    check_device("copy_pages", from_pages=from_pages, to_pages=to_pages)
    check_contiguous("copy_pages", from_pages=from_pages, to_pages=to_pages)
    _check_page_caches("caches", caches, caches[0], from_pages.device)
    if from_caches is not None:
        _check_page_caches("from_caches", sources, caches[0], from_pages.device)
    torch.ops.fastkernels.copy_pages(caches, from_pages, to_pages, None if from_caches is None else sources)


def _check_page_caches(
    name: str, caches: Sequence[torch.Tensor], like: torch.Tensor, device: torch.device
) -> None:
    first = caches[0]
    for layer, cache in enumerate(caches):
        this = f"copy_pages: {name}[{layer}]"
        check_dtype("copy_pages", f"{name}[{layer}]", cache, (*FLOAT_DTYPES, *BYTE_DTYPES))
        require(
            cache.dtype == like.dtype and cache.dim() >= 1 and cache.shape[1:] == like.shape[1:],
            f"{this} is {dtype_name(cache.dtype)} {list(cache.shape)}, but the op takes pages alike, "
            f"and caches[0] is {dtype_name(like.dtype)} {list(like.shape)}",
        )
        require(
            cache.shape == first.shape and cache.device == first.device,
            f"{this} is {list(cache.shape)} on {cache.device}, but {name}[0] is {list(first.shape)} on "
            f"{first.device}; the layers must be alike",
        )
        check_contiguous("copy_pages", **{f"{name}[{layer}]": cache})
    if first.device == device:
        return
    require(
        first.device.type == "cpu" and device.type == "cuda",
        f"copy_pages: {name} are on {first.device}, but from_pages is on {device}; they must share a device, "
        "or the caches lie in pinned host memory",
    )
    if not torch.compiler.is_compiling():
        for layer, cache in enumerate(caches):
            require(cache.is_pinned(), f"copy_pages: {name}[{layer}] is in host memory that is not pinned")
