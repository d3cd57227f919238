"""The oracle: every op in plain PyTorch, in the dtype of its inputs (give float64 for the exact answer).

A section a csrc family, a function an op, same names and arguments as in fastkernels.ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# --- norm ---------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out, the new residual)."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


# --- rope ---------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    rotary_dim = cos_sin.shape[-1]
    rows = cos_sin.to(q.dtype)[positions.long().clamp(0, cos_sin.shape[0] - 1)][:, None, :]
    cosine, sine = rows.chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cosine - b * sine, b * cosine + a * sine), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)
        return torch.cat((turned, rest), dim=-1)

    return rotate(q), rotate(k)


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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (q rotated, the new cache)."""
    q, k = rope(q, k, positions, cos_sin, interleaved)
    if k_offset is not None:
        k = k.float() - k_offset
    return q, append_kv(k, v, kv_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


# --- kv_cache -----------------------------------------------------------------------------------------------


def to_cache_dtype(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x [num_tokens, num_kv_heads, head_dim] as the elements of a cache of this dtype."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    x = x.float() if scale is None else x.float() / scale[:, None]
    if dtype == torch.int8:
        return x.clamp(-127, 127).round().nan_to_num(0.0).to(dtype)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def from_cache_dtype(
    kv_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    cache = kv_cache.to(dtype)
    for kv, scale in enumerate((k_scale, v_scale)):
        if scale is not None:
            cache[:, kv] *= scale.to(dtype)[:, None, None]
    return cache


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the new cache."""
    cache, page_size = kv_cache.clone(), kv_cache.shape[3]
    k, v = to_cache_dtype(k, k_scale, cache.dtype), to_cache_dtype(v, v_scale, cache.dtype)
    for token, slot in enumerate(slot_mapping.tolist()):
        if 0 <= slot < cache.shape[0] * page_size:
            cache[slot // page_size, 0, :, slot % page_size] = k[token]
            cache[slot // page_size, 1, :, slot % page_size] = v[token]
    return cache


def copy_pages(
    caches: Sequence[torch.Tensor],
    from_pages: torch.Tensor,
    to_pages: torch.Tensor,
    *,
    from_caches: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Returns the new caches."""
    results = [cache.clone() for cache in caches]
    for result, source in zip(results, caches if from_caches is None else from_caches, strict=True):
        for i, j in zip(from_pages.tolist(), to_pages.tolist(), strict=True):
            if 0 <= i < source.shape[0] and 0 <= j < result.shape[0]:
                result[j] = source[i]
    return results


# --- activation ---------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def linear_silu_mul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return silu_mul(torch.nn.functional.linear(x, weight))


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_weight(
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_type: str,
    block: tuple[int, int] | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[out_size, in_size] of dtype: what ``quantized_linear`` takes the weight for."""
    if weight_type in ("int4", "e2m1"):
        codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1).long()
        table = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), device=codes.device)
        values = codes if weight_type == "int4" else table[codes]
        values = values.to(dtype)
    else:
        values = weight.to(dtype)
    rows, size = block or (1, values.shape[1])
    factors = torch.exp2(scales.to(dtype) - 127) if scales.dtype == torch.uint8 else scales.to(dtype)
    if global_scale is not None:
        factors = factors * global_scale.to(dtype)

    def spread(by_block: torch.Tensor) -> torch.Tensor:
        whole = by_block.repeat_interleave(rows, 0).repeat_interleave(size, 1)
        return whole[: values.shape[0], : values.shape[1]]

    if weight_type == "int4":
        values = values - (8 if zeros is None else spread(zeros.to(dtype)))
    return values * spread(factors)


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    weight_type: str,
    block: tuple[int, int] | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """In dtype; rounding x to bytes stays ``quantize``'s, and so does the result with an out_scale."""
    full = dequantize_weight(weight, scales, weight_type, block, zeros, global_scale, dtype)
    y = torch.nn.functional.linear(
        round_activation(x, activation, dtype), full, None if bias is None else bias.to(dtype)
    )
    y = silu_mul(y) if gated else y
    return y if residual is None else y + residual.to(dtype)


def round_activation(x: torch.Tensor, activation: str | None, dtype: torch.dtype) -> torch.Tensor:
    """x in dtype, rounded to the bytes that ``activation`` names and scaled back."""
    if activation is None:
        return x.to(dtype)
    if activation == "int8-zeros":
        values, by_row, zeros = quantize_zeros(x)
        return (values.to(dtype) - zeros[:, None]) * by_row.to(dtype)[:, None]
    size = 128 if activation.endswith("-block") else x.shape[-1]
    byte_dtype = {"int8": torch.int8, "e5m2": torch.float8_e5m2}.get(activation, torch.float8_e4m3fn)
    rounded = []
    for part in x.split(size, -1):
        values, by_row = quantize(part, "token", dtype=byte_dtype)
        rounded.append(values.to(dtype) * by_row.to(dtype)[:, None])
    return torch.cat(rounded, -1)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_mul(x: torch.Tensor, approximate_tanh: bool = False) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh" if approximate_tanh else "none") * up


# --- quant --------------------------------------------------------------------------------------------------


def quantize(
    x: torch.Tensor,
    per: str = "token",
    scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Defined in fp32, whatever x is: x / scale lies on a tie too often to leave its last bit open.

    The *_quant ops are this of what the op without _quant gives, in float64.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    rows = (x.unflatten(-1, (-1, 128)) if per == "block" else x[:, None]).float()
    if per == "tensor":
        assert scales is not None
        by_row = scales.view(1, 1)
    else:
        most = rows.abs().amax(-1)  # by a tensor: torch on CUDA multiplies by the inverse of a Python number
        by_row = (most / torch.full_like(most, largest)).clamp_min(2.0**-126)
        scales = by_row if per == "block" else by_row[:, 0]
    assert scales is not None
    y = (rows * (1.0 / by_row)[..., None]).flatten(1)
    if dtype == torch.int8:
        return y.round().clamp(-128, 127).to(dtype), scales
    return y.clamp(-largest, largest).to(dtype), scales


def quantize_zeros(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In fp32, as ``quantize``; x is finite."""
    x = x.float()
    least, most = x.amin(1).clamp_max(0.0), x.amax(1).clamp_min(0.0)
    steps = torch.full_like(most, 254.0)
    scales = (most / steps - least / steps).clamp_min(2.0**-126)
    inverse = 1.0 / scales
    zeros = (-127 - (least * inverse).round()).clamp(-127, 127)
    values = ((x * inverse[:, None]).round() + zeros[:, None]).clamp(-127, 127)
    return values.to(torch.int8), scales, zeros.to(torch.int32)


# --- embedding ----------------------------------------------------------------------------------------------


def gather_rows(x: torch.Tensor, row_indices: torch.Tensor) -> torch.Tensor:
    inside = (row_indices >= 0) & (row_indices < x.shape[0])
    out = torch.zeros(row_indices.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    out[inside] = x[row_indices[inside].long()]
    return out


def embedding(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return gather_rows(table, token_ids)


def resolve_token_ids(token_ids: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    last = sampled.tolist()
    ids = [i if i >= 0 else last[-i - 1] if -i <= len(last) else -1 for i in token_ids.tolist()]
    return torch.tensor(ids, dtype=torch.int32, device=token_ids.device)


# --- sampling -----------------------------------------------------------------------------------------------


def token_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution that fastkernels.ops.sample draws from, for one row [vocab_size]."""
    if temperature <= 0.0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).to(logits.dtype)
    order = torch.argsort(logits, descending=True, stable=True)  # of equal logits the lowest id first
    scores = logits[order] / temperature
    if top_k > 0:
        scores[top_k:] = -torch.inf
    if top_p < 1.0:
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        reached = before >= top_p
        reached[0] = False
        scores[reached] = -torch.inf
    probabilities = scores.softmax(-1)
    probabilities[probabilities < min_p * probabilities[0]] = 0.0
    return torch.zeros_like(logits).scatter(0, order, probabilities / probabilities.sum())


def penalize(
    logits: torch.Tensor,
    in_prompt: torch.Tensor,
    output_counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """in_prompt bool and output_counts int are [num_seqs, vocab_size], the penalties [num_seqs]."""
    repeated = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = torch.where(in_prompt | (output_counts > 0), repeated, logits)
    return logits - frequency[:, None] * output_counts - presence[:, None] * (output_counts > 0)


# --- attention ----------------------------------------------------------------------------------------------


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
    out_dtype: torch.dtype | None = None,
    tree_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows past cu_seqlens_q[-1] and queries that see no key are zeros; of e4m3 it computes in fp32."""
    if q.dtype == torch.float8_e4m3fn:
        return attention(
            _from_e4m3(q, q_scale),
            _from_e4m3(k, k_scale),
            _from_e4m3(v, v_scale),
            cu_seqlens_q,
            cu_seqlens_k,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            tree_mask=tree_mask,
        ).to(out_dtype or torch.bfloat16)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        queries = q[starts_q[i] : starts_q[i + 1]]
        keys, values = k[starts_k[i] : starts_k[i + 1]], v[starts_k[i] : starts_k[i + 1]]
        len_q, len_k = queries.shape[0], keys.shape[0]
        if len_q == 0 or len_k == 0:
            continue
        group = q.shape[1] // k.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        own = len_k - len_q + torch.arange(len_q, device=q.device)[:, None]
        key = torch.arange(len_k, device=q.device)[None]
        hidden = (key > own) if causal else torch.zeros_like(key > own)
        if window:
            hidden |= key <= own - window
        if tree_mask is not None and len_q <= 64:
            bits = tree_mask[starts_q[i] : starts_q[i + 1], None] >> torch.arange(len_q, device=q.device) & 1
            hidden[:, : len_k - len_q] = False
            hidden[:, len_k - len_q :] = bits == 0
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
        out[starts_q[i] : starts_q[i + 1]] = torch.einsum("hqk,khd->qhd", probabilities, values)
    return out


def _from_e4m3(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[tokens, heads, head_dim] in fp32; scale: [num_kv_heads], of a KV head and its query heads."""
    if scale is None:
        return x.float()
    return x.float() * scale.repeat_interleave(x.shape[1] // scale.shape[0])[:, None]


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
    out_dtype: torch.dtype | None = None,
    tree_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    page_size = kv_cache.shape[3]
    if q.dtype == torch.float8_e4m3fn:
        return paged_attention(
            _from_e4m3(q, q_scale),
            kv_cache,
            page_table,
            seq_lens,
            cu_seqlens_q,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            tree_mask=tree_mask,
        ).to(out_dtype or torch.bfloat16)
    kv_cache = from_cache_dtype(kv_cache, k_scale, v_scale, q.dtype)
    keys, values = [kv_cache[:0, 0, :, 0]], [kv_cache[:0, 0, :, 0]]
    for i, length in enumerate(seq_lens.tolist()):
        # [pages, 2, num_kv_heads, page_size, head_dim]
        pages = kv_cache[page_table[i, : -(-length // page_size)].long()]
        tokens = pages.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
        keys.append(tokens[0])
        values.append(tokens[1])
    cu_seqlens_k = torch.cat([seq_lens.new_zeros(1), seq_lens.cumsum(0, dtype=torch.int32)])
    return attention(
        q,
        torch.cat(keys),
        torch.cat(values),
        cu_seqlens_q,
        cu_seqlens_k,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        tree_mask=tree_mask,
    )
