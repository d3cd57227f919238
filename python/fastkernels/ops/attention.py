"""Attention over contiguous sequences of variable length, and over the pages of a KV cache."""

from __future__ import annotations

import torch

from fastkernels import config
from fastkernels.ops.attention_plan import AttentionPlan, check_cu_seqlens, check_lengths, plan_for
from fastkernels.ops.checks import (
    BYTE_DTYPES,
    FLOAT_DTYPES,
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_scales,
    check_shape,
    dtype_name,
    register_mutating_fake,
    require,
)

HEAD_DIMS = (64, 80, 96, 128, 256)  # of the CUDA kernels
MAX_HEAD_DIM = 256  # the CPU kernels take every head_dim up to this

register_mutating_fake("attention", "paged_attention")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out = softmax(mask(scale * q k^T)) v for each of num_seqs sequences that lie one after the other.

    q:            [num_tokens, num_q_heads, head_dim] bf16 | fp16 | fp32 | float8_e4m3fn; last dimension
                  contiguous, any stride of the others (a slice of a merged projection)
    k, v:         [num_keys, num_kv_heads, head_dim], dtype of q, strides as q; num_q_heads is a multiple of
                  num_kv_heads. head_dim is 64, 80, 96, 128 or 256 on CUDA, any up to 256 on the CPU
    cu_seqlens_q: int32 [num_seqs + 1], contiguous: sequence i has the queries cu_seqlens_q[i] up to [i + 1]
    cu_seqlens_k: int32 [num_seqs + 1], contiguous: its keys likewise
    scale:        1 / sqrt(head_dim) when None
    causal:       query i of a sequence sees its keys up to len_k - len_q + i; else all of them
    window:       with causal, a query sees that key and the window - 1 before it; 0 is off
    soft_cap:     scores become soft_cap * tanh(scores / soft_cap); 0 is off
    q_scale, k_scale, v_scale: fp32 [num_kv_heads], positive, of q, k and v in e4m3: what their bytes are
                  multiplied by, q_scale for all query heads of a KV head. 1 when None
    plan:         a filled AttentionPlan to share between calls; one is made when None (CUDA); of q in e4m3
                  it is made for the dtype of out
    out:          like q, of q in e4m3 in bf16 or fp16; allocated when None. Rows past cu_seqlens_q[-1] are
                  padding and stay as they are; a query of a sequence with keys that sees none of them gives
                  zeros
    out_dtype:    of the out that is allocated: dtype of q, or bf16 when q is e4m3
    Returns out. Accumulates in fp32; bitwise repeatable; safe in a CUDA graph. With q in e4m3, prefill tiles
    on Hopper (head_dim 128) round weights to e4m3, relative to the largest of the row; elsewhere products are
    of fp16, which holds e4m3 exactly.
    Raises ValueError for a shape, dtype, stride, device or length it does not take, naming what it does;
    lengths in GPU memory are checked with FASTKERNELS_DEBUG=1 only.
    Source: Dao et al. 2022, Dao 2023. Kernels: csrc/attention/
    """
    op = "attention"
    q, k, v = as_tensor(q), as_tensor(k), as_tensor(v)
    cu_seqlens_q, cu_seqlens_k = as_tensor(cu_seqlens_q), as_tensor(cu_seqlens_k)
    _check_q(op, q)
    check_dtype(op, "k", k, (q.dtype,))
    check_dtype(op, "v", v, (q.dtype,))
    check_shape(
        op, "k", k, (None, None, q.shape[2]), "[num_keys, num_kv_heads, head_dim], head_dim that of q"
    )
    check_shape(op, "v", v, tuple(k.shape), "the shape of k")
    num_seqs = check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    check_lengths(op, "cu_seqlens_k", cu_seqlens_k, num_seqs + 1, "[num_seqs + 1], like cu_seqlens_q")
    require(causal or window == 0, f"attention: window is {window}, but a window needs causal=True")
    scale = _check_numbers(op, q, k.shape[1], scale, window, soft_cap)
    for name, scaled, x in (("q_scale", q_scale, q), ("k_scale", k_scale, k), ("v_scale", v_scale, v)):
        _check_scale(op, name, scaled, x, k.shape[1])
    require(
        scale > 0.0 or q.device.type != "cuda" or q.dtype != torch.float8_e4m3fn,
        f"attention: scale is {scale}, but with q in float8_e4m3fn the CUDA kernels take positive ones",
    )
    out = _like_q(op, q, out, out_dtype)
    check_device(op, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, out=out)
    check_last_contiguous(op, k=k, v=v)
    if _debug():
        _debug_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        _debug_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    work_map, workspace = plan_for(
        op, plan, out, k.shape[1], cu_seqlens_q, cu_seqlens_k, None, window, causal
    )
    torch.ops.fastkernels.attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        work_map,
        workspace,
        scale,
        causal,
        window,
        soft_cap,
        out,
        q_scale,
        k_scale,
        v_scale,
    )
    return out


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    max_query_len: int | None = None,
    plan: AttentionPlan | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Causal attention of a step's queries over the KV cache: any mix of prefill chunks and decodes.

    q:            [num_tokens, num_q_heads, head_dim] bf16 | fp16 | fp32, or float8_e4m3fn over a cache of the
                  same; last dimension contiguous, any stride of the others
    kv_cache:     [num_pages, 2, num_kv_heads, page_size, head_dim] contiguous (0 is K, 1 is V), dtype of q,
                  float8_e4m3fn, float8_e5m2 or int8 (on CUDA with q in bf16 or fp16), with the keys of this
                  step appended; page_size is a power of two, at least 8 on CUDA. head_dim as in ``attention``
    page_table:   int32 [num_seqs, max_pages], any two strides: token t of sequence i lies in page
                  page_table[i, t // page_size]; entries past the sequence, or before its window, are not read
    seq_lens:     int32 [num_seqs]: tokens of a sequence, counting this step's; 0 skips it
    cu_seqlens_q: int32 [num_seqs + 1]: sequence i has the queries cu_seqlens_q[i] up to [i + 1], which are
                  its last tokens
    k_scale, v_scale: fp32 [num_kv_heads], positive, of a cache of one-byte elements: a key is its bytes times
                  k_scale of its head. 1 when None
    q_scale:      fp32 [num_kv_heads], positive, of q in e4m3, for all query heads of a KV head. 1 when None
    tree_mask:    int64 [num_tokens], contiguous: token i of a sequence sees the new token j of that sequence
                  where bit j of its mask is set (its own too), and all older ones. Sequences of more than 64
                  new tokens stay causal. Without a window; on CUDA with q in bf16 or fp16
    max_query_len: a promise that no sequence has more queries than this (1: a step of decodes). The kernels
                  for longer ones are then not launched, nor captured in a CUDA graph, so that a sequence that
                  breaks it may get no result. None promises nothing
    scale, window, soft_cap, plan, out, out_dtype: as in ``attention``
    Returns out. Accumulates in fp32; with a cache of bytes q is rounded to fp16, in which they are exact, and
    with q in e4m3 weights are rounded as in ``attention``; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride, device, length or page it does not take, naming what it
    does; lengths and pages in GPU memory are checked with FASTKERNELS_DEBUG=1 only.
    Source: Kwon et al. 2023; Dao et al. 2023 (split contexts). Kernels: csrc/attention/
    """
    op = "paged_attention"
    q, kv_cache, page_table = as_tensor(q), as_tensor(kv_cache), as_tensor(page_table)
    seq_lens, cu_seqlens_q = as_tensor(seq_lens), as_tensor(cu_seqlens_q)
    _check_q(op, q)
    check_dtype(
        op, "kv_cache", kv_cache, (q.dtype,) if q.dtype == torch.float8_e4m3fn else (q.dtype, *BYTE_DTYPES)
    )
    check_shape(
        op,
        "kv_cache",
        kv_cache,
        (None, 2, None, None, q.shape[2]),
        "[num_pages, 2, num_kv_heads, page_size, head_dim of q]",
    )
    require(kv_cache.is_contiguous(), "paged_attention: kv_cache must be contiguous")
    page_size = kv_cache.shape[3]
    require(
        page_size > 0 and page_size & (page_size - 1) == 0,
        f"paged_attention: page_size is {page_size}, but the op takes powers of two",
    )
    num_seqs = check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    check_lengths(op, "seq_lens", seq_lens, num_seqs, "[num_seqs], one less than cu_seqlens_q")
    check_dtype(op, "page_table", page_table, (torch.int32,))
    check_shape(op, "page_table", page_table, (num_seqs, None), "[num_seqs, max_pages]")
    scale = _check_numbers(op, q, kv_cache.shape[2], scale, window, soft_cap)
    _check_scale(op, "q_scale", q_scale, q, kv_cache.shape[2])
    check_scales(op, kv_cache, k_scale, v_scale)
    if tree_mask is not None:
        check_dtype(op, "tree_mask", tree_mask, (torch.int64,))
        check_shape(op, "tree_mask", tree_mask, (q.shape[0],), "[num_tokens]")
        check_contiguous(op, tree_mask=tree_mask)
        require(window == 0, f"paged_attention: window is {window}, but a tree_mask takes none")
    require(
        max_query_len is None or max_query_len >= 1,
        f"paged_attention: max_query_len is {max_query_len}, but the op takes 1 and more, or None",
    )
    if q.device.type == "cuda" and (tree_mask is not None or kv_cache.dtype in BYTE_DTYPES):
        what = "a tree_mask" if tree_mask is not None else f"a cache of {dtype_name(kv_cache.dtype)}"
        require(
            q.dtype != torch.float32 and scale > 0.0,
            f"paged_attention: q is {dtype_name(q.dtype)} and scale {scale}, but with {what} the CUDA "
            "kernels take bf16 and fp16 and a positive scale",
        )
    out = _like_q(op, q, out, out_dtype)
    check_device(
        op,
        q=q,
        tree_mask=tree_mask,
        kv_cache=kv_cache,
        page_table=page_table,
        seq_lens=seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        out=out,
    )
    require(
        q.device.type != "cuda" or page_size >= 8,
        f"paged_attention: page_size is {page_size}, but the CUDA kernels take powers of two from 8",
    )
    if _debug():
        _debug_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        _debug_pages(cu_seqlens_q, seq_lens, page_table, page_size, kv_cache.shape[0], window)
        longest = int(cu_seqlens_q.cpu().diff().max()) if num_seqs else 0
        require(
            max_query_len is None or longest <= max_query_len,
            f"paged_attention: a sequence has {longest} queries, but max_query_len is {max_query_len}",
        )
    work_map, workspace = plan_for(
        op, plan, out, kv_cache.shape[2], cu_seqlens_q, None, seq_lens, window, True
    )
    torch.ops.fastkernels.paged_attention(
        q,
        kv_cache,
        page_table,
        seq_lens,
        cu_seqlens_q,
        work_map,
        workspace,
        scale,
        window,
        soft_cap,
        out,
        k_scale,
        v_scale,
        tree_mask,
        q_scale,
        max_query_len or 0,
    )
    return out


# --- what the faces check -----------------------------------------------------------------------------------


def _check_q(op: str, q: torch.Tensor) -> None:
    check_dtype(op, "q", q, (*FLOAT_DTYPES, torch.float8_e4m3fn))
    check_shape(op, "q", q, (None, None, None), "[num_tokens, num_q_heads, head_dim]")
    check_last_contiguous(op, q=q)
    head_dim = q.shape[2]
    if q.device.type == "cuda":
        takes = ", ".join(map(str, HEAD_DIMS))
        require(head_dim in HEAD_DIMS, f"{op}: head_dim is {head_dim}, but the CUDA kernels take {takes}")
    else:
        require(
            0 < head_dim <= MAX_HEAD_DIM,
            f"{op}: head_dim is {head_dim}, but the op takes 1 to {MAX_HEAD_DIM}",
        )


def _check_numbers(
    op: str, q: torch.Tensor, num_kv_heads: int, scale: float | None, window: int, soft_cap: float
) -> float:
    require(
        num_kv_heads > 0 and q.shape[1] > 0 and q.shape[1] % num_kv_heads == 0,
        f"{op}: num_q_heads is {q.shape[1]}, but the op takes multiples of num_kv_heads ({num_kv_heads})",
    )
    require(
        0 <= window < 2**31, f"{op}: window is {window}, but the op takes a number of tokens or 0 for none"
    )
    require(
        soft_cap >= 0.0, f"{op}: soft_cap is {soft_cap}, but the op takes a positive number or 0 for none"
    )
    return q.shape[2] ** -0.5 if scale is None else scale


def _check_scale(op: str, name: str, scale: torch.Tensor | None, x: torch.Tensor, num_kv_heads: int) -> None:
    """A scale of q, k or v: given only where its elements are e4m3."""
    if scale is None:
        return
    require(
        x.dtype == torch.float8_e4m3fn,
        f"{op}: {name} is given, but {name[0]} is {dtype_name(x.dtype)}; it is for float8_e4m3fn",
    )
    check_dtype(op, name, scale, (torch.float32,))
    check_shape(op, name, scale, (num_kv_heads,), "[num_kv_heads]")
    check_device(op, **{name[0]: x, name: scale})
    check_contiguous(op, **{name: scale})


def _like_q(
    op: str, q: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype | None
) -> torch.Tensor:
    takes = (torch.bfloat16, torch.float16) if q.dtype == torch.float8_e4m3fn else (q.dtype,)
    if out is None:
        dtype = takes[0] if out_dtype is None else out_dtype
        words = " and ".join(map(dtype_name, takes))
        require(
            dtype in takes,
            f"{op}: out_dtype is {dtype_name(dtype)}, but with q in {dtype_name(q.dtype)} the op takes "
            + words,
        )
        return torch.empty(q.shape, dtype=dtype, device=q.device)
    out = as_tensor(out)
    check_dtype(op, "out", out, takes)
    require(
        out_dtype is None or out_dtype == out.dtype,
        f"{op}: out_dtype is not the dtype of out, {dtype_name(out.dtype)}",
    )
    check_shape(op, "out", out, tuple(q.shape), "the shape of q")
    check_last_contiguous(op, out=out)
    return out


# --- the debug mode: lengths and pages in GPU memory, at the price of a synchronisation ---------------------


def _debug() -> bool:
    return not torch.compiler.is_compiling() and config.debug()


def _debug_cu_seqlens(op: str, name: str, cu_seqlens: torch.Tensor, num_rows: int) -> None:
    lengths = cu_seqlens.cpu()
    require(int(lengths[0]) >= 0, f"{op}: {name} must not be negative")
    require(bool((lengths.diff() >= 0).all()), f"{op}: {name} must not decrease")
    require(
        int(lengths[-1]) <= num_rows,
        f"{op}: {name} ends at {int(lengths[-1])}, but there are {num_rows} rows",
    )


def _debug_pages(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    num_pages: int,
    window: int,
) -> None:
    num_queries, lengths, table = cu_seqlens_q.cpu().diff(), seq_lens.cpu(), page_table.cpu()
    for i in torch.nonzero(num_queries).flatten().tolist():
        length, capacity = int(lengths[i]), table.shape[1] * page_size
        require(
            length <= capacity,
            f"paged_attention: sequence {i} has {length} tokens, but its row of the page table holds "
            f"{capacity}",
        )
        first = max(0, (length - int(num_queries[i]) + 1 - window) // page_size) if window else 0
        pages = table[i, first : -(-length // page_size)]
        wrong = pages[(pages < 0) | (pages >= num_pages)].tolist()
        require(
            not wrong,
            f"paged_attention: sequence {i} names page {wrong[0] if wrong else 0}, "
            f"but the cache has pages 0 to {num_pages - 1}",
        )
