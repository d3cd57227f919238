"""Runs a plan: allocates all of its memory once, binds its steps to calls, and calls them in order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from fastkernels import _C
from fastkernels.compiler import Buffer, Ledger, Plan, Step, arena_layout
from fastkernels.compiler.ledger import kv_bytes_per_page
from fastkernels.compiler.lower import kv_cache_name
from fastkernels.compiler.tune import BY_RULE, Call, Choices, matmul_runs_on, product_of
from fastkernels.models.rope_scaling import build_cos_sin
from fastkernels.ops.gemm import matmul_workspace
from fastkernels.runtime.bind import Products, bind
from fastkernels.runtime.cuda_graphs import CudaGraphs
from fastkernels.runtime.one_token import for_one_token
from fastkernels.runtime.step import StepBuffers

_BOUND_SIZES = 64  # lists of calls that are kept, by size of the step: each holds a view a buffer

_Size = TypeVar("_Size")
_Bound = TypeVar("_Bound")


class Executor:
    """Runs the steps of ``plan`` on the contents of ``inputs``, for any batch that fits the sizes given here.

    weights:        a tensor for every name in plan.weights, of its dtype or ``dtype``, on ``device``
    max_num_tokens: most rows of a step; max_num_seqs: most sequences, and logits rows, of a step
    max_seq_len:    tokens of the longest sequence: the length of the rotary table, and of a row of the page
    table
    num_pages:      of the KV cache; 0: ``set_kv_cache`` allocates it later
    choices:        tactics of the matrix products on a GPU; by rule where there is none
    On CUDA everything runs on the current stream. Not thread-safe.
    Raises ValueError for a weight that is missing or does not fit, and for a size that is not positive.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        max_num_tokens: int,
        max_num_seqs: int,
        max_seq_len: int,
        num_pages: int = 0,
        page_size: int = 16,
        choices: Choices = BY_RULE,
    ) -> None:
        sizes = {
            "max_num_tokens": max_num_tokens,
            "max_num_seqs": max_num_seqs,
            "max_seq_len": max_seq_len,
            "page_size": page_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        self.plan = plan
        self.device = _indexed(torch.device(device))
        self.dtype = dtype
        self.max_num_tokens = max_num_tokens
        self.max_num_seqs = max_num_seqs
        self.max_seq_len = max_seq_len
        self.page_size = page_size
        self.num_pages = 0
        self.inputs = StepBuffers(max_num_tokens, max_num_seqs, -(-max_seq_len // page_size), self.device)
        self.kv_bytes_per_page = kv_bytes_per_page(plan, page_size, dtype.itemsize)
        self.kv_caches: list[Tensor] = []
        self._layer_of_cache = {kv_cache_name(layer): layer for layer in range(plan.config.num_layers)}
        self._weights = _checked_weights(plan, weights, self.device, dtype)
        self._layout = arena_layout(
            plan, max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs, element_bytes=dtype.itemsize
        )
        self._arena = torch.zeros(self._layout.size_bytes, dtype=torch.uint8, device=self.device)
        self._cos_sin = build_cos_sin(plan.config, max_seq_len).to(self.device)
        self._attention_map, self._attention_workspace = self._attention_buffers()
        has_matmul = matmul_runs_on(self.device, dtype)
        self._products = Products(choices, matmul_workspace(self.device) if has_matmul else None)
        self._bodies: OrderedDict[tuple[int, int], list[Call]] = OrderedDict()
        self._heads: OrderedDict[int, tuple[list[Call], Tensor]] = OrderedDict()
        self._graphs = CudaGraphs(self.run, self.device)
        if num_pages:
            self.set_kv_cache(num_pages)

    @property
    def ledger(self) -> Ledger:
        """Bytes on the device, as allocated and, for the graphs, as measured."""
        workspaces = [self._cos_sin, self._attention_map, self._attention_workspace]
        if self._products.workspace is not None:
            workspaces.append(self._products.workspace)
        return Ledger(
            weights_bytes=sum(weight.nbytes for weight in self._weights.values()),
            arena_bytes=self._arena.nbytes,
            workspaces_bytes=self.inputs.size_bytes + sum(t.nbytes for t in workspaces),
            graphs_bytes=self._graphs.size_bytes,
            kv_bytes_per_page=self.kv_bytes_per_page,
            num_pages=self.num_pages,
            page_size=self.page_size,
            arena_unshared_bytes=self._layout.unshared_bytes,
        )

    def set_kv_cache(self, num_pages: int) -> None:
        """Allocates the layers' caches, [num_pages, 2, num_kv_heads, page_size, head_dim] each, zeroed, in
        the plan's dtype.

        Replaces those there are, with their contents, and drops the graphs, which hold their addresses.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a KV cache has at least 1")
        config = self.plan.config
        self._forget()
        self.kv_caches = []  # the old ones go before the new ones come
        shape = (num_pages, 2, config.num_kv_heads, self.page_size, config.head_dim)
        self.kv_caches = [
            torch.zeros(shape, dtype=self._dtype_of(cache), device=self.device)
            for cache in self.plan.kv_caches
        ]
        self.num_pages = num_pages

    def close(self) -> None:
        """Lets go of all memory; nothing can be run afterwards."""
        self._forget()
        self.kv_caches = []
        self.num_pages = 0
        self._weights = {}
        self._products = Products()
        self._arena = torch.empty(0, dtype=torch.uint8, device=self.device)

    # --- running ----------------------------------------------------------------------------------------

    def run(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> Tensor:
        """One step on exactly num_tokens rows of ``inputs`` -> logits [num_logits, vocab_size], valid until
        the next
        step. Padding rows have slot_mapping -1. num_logits may be 0. max_query_len: no sequence has more
        tokens in the step, which saves launches; 0: any may."""
        self.run_body(num_tokens, max_query_len)
        return self.run_head(num_logits)

    def run_body(self, num_tokens: int, max_query_len: int = 0) -> None:
        """The layers: hidden states of num_tokens rows, which stay in place for ``run_head``."""
        calls = self._bodies.get((num_tokens, max_query_len))
        if calls is None:
            calls = self._bind_body(num_tokens, max_query_len)
        self._call(calls)

    def run_head(self, num_logits: int) -> Tensor:
        """Logits of the rows of the last body that inputs.logits_indices names -> [num_logits, vocab_size];
        any number
        of times after one body."""
        bound = self._heads.get(num_logits)
        if bound is None:
            bound = self._bind_head(num_logits)
        calls, logits = bound
        if num_logits:
            self._call(calls)
        return logits

    def capture(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> None:
        """Records ``run`` of these sizes as a CUDA graph, once; does nothing on the CPU.

        Runs the step a few times first, on the contents of ``inputs`` but without writing to the KV cache.
        """
        if self.device.type != "cuda":
            return
        slot_mapping = self.inputs.slot_mapping.clone()
        self.inputs.slot_mapping.fill_(-1)
        self._graphs.capture(num_tokens, num_logits, max_query_len)
        self.inputs.slot_mapping.copy_(slot_mapping)

    def replay(self, num_tokens: int, num_logits: int, max_query_len: int = 0) -> Tensor:
        """What ``run`` does, by the graph of these sizes; on the CPU, ``run`` itself.

        Raises KeyError where ``capture`` recorded none of these sizes.
        """
        return self._graphs.replay(num_tokens, num_logits, max_query_len)

    def _call(self, calls: list[Call]) -> None:
        if self.dtype == torch.float32 and self.device.type == "cuda":
            with _no_tf32(), torch.inference_mode():
                for call in calls:
                    call()
        else:
            with torch.inference_mode():
                for call in calls:
                    call()

    # --- binding ----------------------------------------------------------------------------------------

    def _bind_body(self, num_tokens: int, max_query_len: int) -> list[Call]:
        if not 1 <= num_tokens <= self.max_num_tokens:
            raise ValueError(f"num_tokens is {num_tokens}; this executor takes 1 to {self.max_num_tokens}")
        if not self.kv_caches:
            raise ValueError("the executor has no KV cache yet; call set_kv_cache(num_pages) first")
        calls = self._bind(0, self.plan.head_start, num_tokens, 0, max_query_len)
        return _remember(self._bodies, (num_tokens, max_query_len), calls)

    def _bind_head(self, num_logits: int) -> tuple[list[Call], Tensor]:
        """The head reads all the rows of tokens there could be, since logits_indices picks among them."""
        if not 0 <= num_logits <= self.max_num_seqs:
            raise ValueError(f"num_logits is {num_logits}; this executor takes 0 to {self.max_num_seqs}")
        plan = self.plan
        calls = self._bind(plan.head_start, len(plan.steps), self.max_num_tokens, num_logits)
        logits = self._tensor(plan.output, self.max_num_tokens, num_logits)
        return _remember(self._heads, num_logits, (calls, logits))

    def _bind(
        self, begin: int, end: int, num_tokens: int, num_logits: int, max_query_len: int = 0
    ) -> list[Call]:
        calls: list[Call] = []
        steps: Sequence[Step] = self.plan.steps[begin:end]
        if num_tokens == 1 and self._products.workspace is not None:
            steps = for_one_token(self.plan, steps, self._streams_bytes)
        for step in steps:
            if step.op == "attention_plan" and self.device.type == "cpu":
                continue  # the CPU's attention needs no work map
            inputs = [self._tensor(name, num_tokens, num_logits) for name in step.inputs]
            outputs = [self._tensor(name, num_tokens, num_logits) for name in step.outputs]
            calls.append(
                bind(
                    step,
                    inputs,
                    outputs,
                    num_tokens=num_tokens,
                    max_query_len=max_query_len,
                    dtype=self.dtype,
                    products=self._products,
                )
            )
        return calls

    def _streams_bytes(self, step: Step) -> bool:
        if step.op not in ("matmul", "matmul_silu_mul_quant", "quantized_linear"):
            return False
        out, x = self.plan.buffers[step.outputs[-1]], self.plan.buffers[step.inputs[0]]
        return self._products.streams_bytes(product_of(step, out.row_size, x.row_size, self.dtype))

    def _tensor(self, name: str, num_tokens: int, num_logits: int) -> Tensor:
        """The tensor of the plan's buffer ``name`` in a step of these sizes: always a view, never a copy."""
        buffer = self.plan.buffers[name]
        rows = {"tokens": num_tokens, "logits": num_logits, "all": None}[buffer.rows]
        if buffer.kind in ("arena", "alias"):
            assert rows is not None
            return self._arena_rows(buffer, rows)
        tensor = self._given(buffer)
        return tensor if rows is None else tensor[:rows]

    def _dtype_of(self, buffer: Buffer) -> torch.dtype:
        named: torch.dtype = self.dtype if buffer.dtype == "model" else getattr(torch, buffer.dtype)
        return named

    def _arena_rows(self, buffer: Buffer, rows: int) -> Tensor:
        """[rows, *row_shape] within the rows of the buffer that owns the memory."""
        root = self.plan.root(buffer.name)
        dtype = self._dtype_of(buffer)
        begin = self._layout.offsets[root.name]
        whole = self._arena[begin : begin + rows * root.row_size * dtype.itemsize].view(dtype)
        row_strides = [prod(buffer.row_shape[i + 1 :]) for i in range(len(buffer.row_shape))]
        return whole.as_strided(
            (rows, *buffer.row_shape), (root.row_size, *row_strides), whole.storage_offset() + buffer.offset
        )

    def _given(self, buffer: Buffer) -> Tensor:
        if buffer.kind == "input":
            tensor: Tensor = getattr(self.inputs, buffer.name)
            return tensor
        if buffer.kind == "weight":
            return self._weights[buffer.name]
        if buffer.kind == "kv_cache":
            return self.kv_caches[self._layer_of_cache[buffer.name]]
        return {
            "cos_sin": self._cos_sin,
            "attention_map": self._attention_map,
            "attention_workspace": self._attention_workspace,
        }[buffer.name]

    def _attention_buffers(self) -> tuple[Tensor, Tensor]:
        """Work map and workspace for the largest step; the CPU needs neither."""
        map_ints, workspace_floats = 0, 0
        if self.device.type == "cuda":
            config = self.plan.config
            num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            map_ints, workspace_floats = _C.attention_sizes(
                self.max_num_tokens,
                self.max_num_seqs,
                config.num_q_heads,
                config.num_kv_heads,
                config.head_dim,
                num_sms,
            )
        return (
            torch.zeros(map_ints, dtype=torch.int32, device=self.device),
            torch.zeros(workspace_floats, dtype=torch.float32, device=self.device),
        )

    def _forget(self) -> None:
        """Drops every call and graph that holds an address."""
        self._bodies.clear()
        self._heads.clear()
        self._graphs.clear()


def _remember(bound: OrderedDict[_Size, _Bound], size: _Size, item: _Bound) -> _Bound:
    """Keeps ``item``, dropping the oldest when there are too many."""
    bound[size] = item
    if len(bound) > _BOUND_SIZES:
        bound.popitem(last=False)
    return item


@contextmanager
def _no_tf32() -> Iterator[None]:
    """fp32 means fp32, whatever the program around the engine allows its own matrix products."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = allowed


def _indexed(device: torch.device) -> torch.device:
    """cuda -> cuda:0, or the current one, as tensors name their device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked_weights(
    plan: Plan, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    for name, spec in plan.weights.items():
        if name not in weights:
            raise ValueError(f"the weight {name!r} of the plan is missing")
        weight = weights[name]
        wanted = dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
        if tuple(weight.shape) != spec.shape or weight.dtype != wanted or weight.device != device:
            raise ValueError(
                f"the weight {name!r} is {weight.dtype} {list(weight.shape)} on {weight.device}; the "
                f"executor takes {wanted} {list(spec.shape)} on {device}"
            )
    return {name: weights[name] for name in plan.weights}
