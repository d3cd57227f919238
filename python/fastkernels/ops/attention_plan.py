"""The plan of a step's attention on a GPU: made from the lengths on the device, shared by every layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastkernels._library import _C
from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_shape,
    register_mutating_fake,
    require,
)

register_mutating_fake("attention_plan")


@dataclass(frozen=True)
class AttentionPlan:
    """The work of a step's attention on a GPU: which block does which queries over which keys.

    work_map:  int32, filled on the device by ``plan_attention``
    workspace: fp32, room for the partial results of split contexts
    Both are empty for the CPU, whose kernels need neither.
    """

    work_map: torch.Tensor
    workspace: torch.Tensor

    @classmethod
    def allocate(
        cls,
        *,
        num_tokens: int,
        num_seqs: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> AttentionPlan:
        """Room for steps of up to num_tokens queries of num_seqs sequences; the map is still to be filled."""
        device = torch.device(device)
        ints, floats = attention_plan_sizes(
            num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim, device=device
        )
        # Zeros: the map begins with counters that every launch leaves at zero.
        return cls(
            torch.zeros(ints, dtype=torch.int32, device=device),
            torch.empty(floats, dtype=torch.float32, device=device),
        )


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention_plan_sizes(
    num_tokens: int,
    num_seqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: torch.device | str,
) -> tuple[int, int]:
    """(work_map int32 elements, workspace fp32 elements) for steps of these shapes; (0, 0) on the CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return 0, 0
    return _C.attention_sizes(num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim, _num_sms(device))


def plan_attention(
    plan: AttentionPlan,
    cu_seqlens_q: torch.Tensor,
    *,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cu_seqlens_k: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    window: int = 0,
    causal: bool = True,
) -> AttentionPlan:
    """Fill a plan from the lengths on the device; returns it.

    cu_seqlens_q: int32 [num_seqs + 1]
    num_tokens:   rows of q of the attention calls that will use the plan
    cu_seqlens_k: int32 [num_seqs + 1], for ``attention``; or
    seq_lens:     int32 [num_seqs], for ``paged_attention``
    window, causal: of those calls; the plan is right for any window and best balanced for this one
    One kernel without synchronisation, safe in a CUDA graph; nothing on the CPU.
    Raises ValueError for lengths of another dtype or shape, for both or neither of cu_seqlens_k and seq_lens,
    and for a plan that is too small.
    """
    op = "plan_attention"
    require(
        (cu_seqlens_k is None) != (seq_lens is None),
        "plan_attention: give either cu_seqlens_k (contiguous keys) or seq_lens (paged keys)",
    )
    num_seqs = check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        check_lengths(op, "cu_seqlens_k", cu_seqlens_k, num_seqs + 1, "[num_seqs + 1]")
    if seq_lens is not None:
        check_lengths(op, "seq_lens", seq_lens, num_seqs, "[num_seqs]")
    check_dtype(op, "dtype", torch.empty(0, dtype=dtype, device="meta"), FLOAT_DTYPES)
    check_device(
        op, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seq_lens=seq_lens, work_map=plan.work_map
    )
    _check_plan(op, plan, cu_seqlens_q.device, num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim)
    torch.ops.fastkernels.attention_plan(
        cu_seqlens_q,
        cu_seqlens_k,
        seq_lens,
        num_tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        window,
        causal,
        dtype,
        plan.work_map,
    )
    return plan


def check_lengths(op: str, name: str, x: torch.Tensor, size: int | None, words: str) -> None:
    check_dtype(op, name, x, (torch.int32,))
    check_shape(op, name, x, (size,), words)
    require(x.is_contiguous(), f"{op}: {name} must be contiguous")


def check_cu_seqlens(op: str, name: str, x: torch.Tensor) -> int:
    check_lengths(op, name, x, None, "[num_seqs + 1]")
    require(x.shape[0] >= 1, f"{op}: {name} is empty, but the op takes [num_seqs + 1] entries, the first 0")
    return x.shape[0] - 1


def _check_plan(
    op: str,
    plan: AttentionPlan,
    device: torch.device,
    num_tokens: int,
    num_seqs: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    ints, floats = attention_plan_sizes(
        num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim, device=device
    )
    room = (plan.work_map.numel(), plan.workspace.numel())
    require(
        room[0] >= ints and room[1] >= floats,
        f"{op}: the plan has room for {room[0]} and {room[1]} elements, but these shapes need {ints} and "
        f"{floats}; allocate it for the largest step",
    )


def plan_for(
    op: str,
    plan: AttentionPlan | None,
    q: torch.Tensor,
    num_kv_heads: int,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    window: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_q_heads, head_dim = q.shape
    if plan is not None:
        check_device(op, q=q, work_map=plan.work_map, workspace=plan.workspace)
        _check_plan(
            op, plan, q.device, num_tokens, cu_seqlens_q.shape[0] - 1, num_q_heads, num_kv_heads, head_dim
        )
        return plan.work_map, plan.workspace
    if q.device.type != "cuda":
        return q.new_empty(0, dtype=torch.int32), q.new_empty(0, dtype=torch.float32)
    return torch.ops.fastkernels.make_attention_plan(
        cu_seqlens_q,
        cu_seqlens_k,
        seq_lens,
        num_tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        window,
        causal,
        q.dtype,
    )


# An op of its own, because torch.compile cannot trace the call that computes the sizes.
@torch.library.custom_op("fastkernels::make_attention_plan", mutates_args=())
def _make_attention_plan(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    causal: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = AttentionPlan.allocate(
        num_tokens=num_tokens,
        num_seqs=cu_seqlens_q.shape[0] - 1,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        device=cu_seqlens_q.device,
    )
    torch.ops.fastkernels.attention_plan(
        cu_seqlens_q,
        cu_seqlens_k,
        seq_lens,
        num_tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        window,
        causal,
        dtype,
        plan.work_map,
    )
    return plan.work_map, plan.workspace


@_make_attention_plan.register_fake
def _(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    causal: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_seqs, device = cu_seqlens_q.shape[0] - 1, cu_seqlens_q.device
    if isinstance(num_tokens, int) and isinstance(num_seqs, int):
        ints, floats = attention_plan_sizes(
            num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim, device=device
        )
    else:  # dynamic shapes: sizes known at run time only
        context = torch.library.get_ctx()
        ints, floats = context.new_dynamic_size(), context.new_dynamic_size()
    return cu_seqlens_q.new_empty(ints), cu_seqlens_q.new_empty(floats, dtype=torch.float32)
