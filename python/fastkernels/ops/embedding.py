"""Rows picked by index: of the embedding table, of a step's hidden states; and the token ids themselves."""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    as_tensor,
    check_contiguous,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_range_in_debug,
    check_shape,
    register_mutating_fake,
)

register_mutating_fake("embedding", "resolve_token_ids", "gather_rows")


def _check_out(op: str, rows: torch.Tensor, indices: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """out checked, or a new one."""
    shape = (indices.shape[0], rows.shape[1])
    if out is None:
        return torch.empty(shape, dtype=rows.dtype, device=rows.device)
    out = as_tensor(out)
    check_dtype(op, "out", out, (rows.dtype,))
    check_shape(op, "out", out, shape, f"{list(shape)}, a row an index")
    check_device(op, indices=indices, out=out)
    check_last_contiguous(op, out=out)
    return out


def embedding(
    token_ids: torch.Tensor, table: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y[t] = table[token_ids[t]], bit for bit.

    token_ids: [num_tokens] int32 | int64, contiguous
    table:     [vocab_size, hidden_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride
    out:       [num_tokens, hidden_size], dtype of table; allocated when None
    Returns out. Safe in a CUDA graph. An id outside the vocabulary gives zeros; with FASTKERNELS_DEBUG set it
    raises.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/embedding/gather_rows.cu, gather_rows.cpp
    """
    token_ids, table = as_tensor(token_ids), as_tensor(table)
    check_dtype("embedding", "token_ids", token_ids, INDEX_DTYPES)
    check_shape("embedding", "token_ids", token_ids, (None,), "[num_tokens]")
    check_dtype("embedding", "table", table, FLOAT_DTYPES)
    check_shape("embedding", "table", table, (None, None), "[vocab_size, hidden_size]")
    check_device("embedding", token_ids=token_ids, table=table)
    check_last_contiguous("embedding", table=table)
    check_contiguous("embedding", token_ids=token_ids)
    check_range_in_debug("embedding", "token_ids", token_ids, 0, table.shape[0], "the rows of table")
    out = _check_out("embedding", table, token_ids, out)
    torch.ops.fastkernels.embedding(token_ids, table, out)
    return out


def gather_rows(
    x: torch.Tensor, row_indices: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y[r] = x[row_indices[r]], bit for bit.

    x:           [num_tokens, size] bf16 | fp16 | fp32; last dimension contiguous, any row stride
    row_indices: [num_rows] int32, contiguous
    out:         [num_rows, size], dtype of x, not overlapping x; allocated when None
    Returns out. Safe in a CUDA graph. An index outside x gives zeros; with FASTKERNELS_DEBUG set it raises.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/embedding/gather_rows.cu, gather_rows.cpp
    """
    x, row_indices = as_tensor(x), as_tensor(row_indices)
    check_dtype("gather_rows", "x", x, FLOAT_DTYPES)
    check_shape("gather_rows", "x", x, (None, None), "[num_tokens, size]")
    check_dtype("gather_rows", "row_indices", row_indices, (torch.int32,))
    check_shape("gather_rows", "row_indices", row_indices, (None,), "[num_rows]")
    check_device("gather_rows", x=x, row_indices=row_indices)
    check_last_contiguous("gather_rows", x=x)
    check_contiguous("gather_rows", row_indices=row_indices)
    check_range_in_debug("gather_rows", "row_indices", row_indices, 0, x.shape[0], "the rows of x")
    out = _check_out("gather_rows", x, row_indices, out)
    torch.ops.fastkernels.gather_rows(x, row_indices, out)
    return out


def resolve_token_ids(
    token_ids: torch.Tensor, sampled: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y[t] = token_ids[t], or where that is negative sampled[-token_ids[t] - 1], sampled in the last step.

    token_ids: [num_tokens] int32, contiguous
    sampled:   [max_num_seqs] int32, contiguous
    out:       like token_ids, may be token_ids itself; allocated when None
    Returns out. Safe in a CUDA graph. An id past sampled gives -1; with FASTKERNELS_DEBUG set it raises.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/embedding/resolve_token_ids.cu, resolve_token_ids.cpp
    """
    token_ids, sampled = as_tensor(token_ids), as_tensor(sampled)
    out = torch.empty_like(token_ids) if out is None else as_tensor(out)
    for name, tensor in {"token_ids": token_ids, "sampled": sampled, "out": out}.items():
        check_dtype("resolve_token_ids", name, tensor, (torch.int32,))
        check_shape("resolve_token_ids", name, tensor, (None,), "one dimension")
    check_shape("resolve_token_ids", "out", out, tuple(token_ids.shape), "the shape of token_ids")
    check_device("resolve_token_ids", token_ids=token_ids, sampled=sampled, out=out)
    check_contiguous("resolve_token_ids", token_ids=token_ids, sampled=sampled, out=out)
    check_range_in_debug(
        "resolve_token_ids",
        "token_ids",
        token_ids,
        -sampled.shape[0],
        2**31,
        "token ids and references to sampled",
    )
    torch.ops.fastkernels.resolve_token_ids(token_ids, sampled, out)
    return out
