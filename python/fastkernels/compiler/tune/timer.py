"""Times a product's step on a GPU as an engine runs it: in a CUDA graph, its weight never in the L2 cache."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from fastkernels.compiler.tune.calls import call_of, empty_outputs, random_weight, random_x
from fastkernels.compiler.tune.tactics import Product, Tactic
from fastkernels.ops.gemm import matmul_workspace

_L2_SIZES = 3  # what the copies of a weight take together, so that a copy is gone when its turn comes again
_MOST_COPIES = 64
_REPLAYS = 3
_REPLAY_US = 400.0  # of a replay at least: while the first runs, the host submits the others
_BYTES_PER_US, _FLOPS_PER_US, _LEAST_US = 4e6, 7e8, 2.0  # a guess of how long a call takes


class CudaTimer:
    """A ``Timer`` of this device. Keeps the tensors of the last product; drop it to give their memory back.

    Copies of the weight take turns. Calls follow one another as dependent launches, so that what a kernel
    reads of its weight while the one before it ends counts as it does in an engine.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self._stream):
            self._workspace = matmul_workspace(device)
        self._capability = torch.cuda.get_device_capability(device)
        self._l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._product: Product | None = None
        self._weights: list[list[Tensor]] = []
        self._x: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, product: Product, num_tokens: int, tactic: Tactic) -> float:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.inference_mode():
            self._prepare(product, num_tokens)
            x = [part[:num_tokens] for part in self._x]
            outputs = [part[:num_tokens] for part in self._outputs]
            calls = [
                call_of(
                    *(product, tactic, [*x, *weight], outputs, self._workspace), capability=self._capability
                )
                for weight in self._weights
            ]
            calls *= rounds(product, num_tokens, sum(part.nbytes for part in self._weights[0]), len(calls))
            calls[0]()  # loads the kernel and lets cuBLAS set itself up, which cannot be captured
            # torch.cuda.graph would give all cached memory back to the driver before every capture.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
            graph.replay()
            events = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(_REPLAYS)
            ]
            for start, end in events:
                start.record()
                graph.replay()
                end.record()
            self._stream.synchronize()
            graph.reset()
            return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3 / len(calls)

    def _prepare(self, product: Product, num_tokens: int) -> None:
        if product != self._product:
            self._product, self._weights, self._x, self._outputs = None, [], [], []
            torch.cuda.empty_cache()  # what graphs of the product before had from the allocator, too
            weight = random_weight(product, self._device)
            copies = num_copies(sum(part.nbytes for part in weight), self._l2_bytes)
            self._weights = [weight, *([part.clone() for part in weight] for _ in range(copies - 1))]
            self._product = product
        if not self._outputs or len(self._outputs[0]) < num_tokens:
            self._x = random_x(product, num_tokens, self._device)
            self._outputs = empty_outputs(product, num_tokens, self._device)


def num_copies(weight_bytes: int, l2_bytes: int) -> int:
    """Weights so small that the most do not pass the cache may be found there in an engine too."""
    return max(2, min(_MOST_COPIES, math.ceil(_L2_SIZES * l2_bytes / weight_bytes)))


def rounds(product: Product, num_tokens: int, weight_bytes: int, copies: int) -> int:
    """How often a replay takes each copy of the weight."""
    flops = 2.0 * num_tokens * product.out_size * product.in_size
    guess_us = max(weight_bytes / _BYTES_PER_US, flops / _FLOPS_PER_US, _LEAST_US)
    return max(1, math.ceil(_REPLAY_US / (guess_us * copies)))
