"""One or two CUDA graphs per token bucket: a step of hundreds of launches replayed by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP_RUNS = 2  # loads kernels and lets cuBLAS set itself up, which cannot be captured


class CudaGraphs:
    """Captures and replays ``run(num_tokens, num_logits, max_query_len)``; on the CPU capturing does nothing
    and replaying runs.

    ``run`` reads what varies from device buffers at fixed addresses and writes into memory that is there
    before, so a graph replays any batch of its size. The graphs share one memory pool, which only cuBLAS
    allocates from: its workspace has the size it has in eager runs, so it chooses the same kernels and a
    replay is bitwise the eager run.
    """

    def __init__(self, run: Callable[[int, int, int], Tensor], device: torch.device) -> None:
        self._run = run
        self._device = device
        self._graphs: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self.size_bytes = 0  # measured: how much less memory the device had free after the captures

    def capture(self, num_tokens: int, num_logits: int, max_query_len: int) -> None:
        sizes = (num_tokens, num_logits, max_query_len)
        if self._device.type != "cuda" or sizes in self._graphs:
            return
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._warm_up(self._stream, sizes)
            free_before, _ = torch.cuda.mem_get_info()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits = self._run(*sizes)
            torch.cuda.synchronize()
            free_after, _ = torch.cuda.mem_get_info()
        self._graphs[sizes] = (graph, logits)
        self.size_bytes += max(free_before - free_after, 0)

    def replay(self, num_tokens: int, num_logits: int, max_query_len: int) -> Tensor:
        sizes = (num_tokens, num_logits, max_query_len)
        if self._device.type != "cuda":
            return self._run(*sizes)
        if sizes not in self._graphs:
            there = [
                f"{tokens} and {rows}" for tokens, rows, longest in self._graphs if longest == max_query_len
            ]
            raise KeyError(
                f"no CUDA graph of {num_tokens} tokens and {num_logits} logits rows was captured"
                f"{f' for sequences of up to {max_query_len}' if max_query_len else ''}; there are "
                f"{', '.join(there) or 'none'}"
            )
        graph, logits = self._graphs[sizes]
        graph.replay()
        return logits

    def clear(self) -> None:
        """Drops all graphs and their memory."""
        self._graphs.clear()
        self._stream = self._pool = None
        self.size_bytes = 0

    def _warm_up(self, stream: torch.cuda.Stream, sizes: tuple[int, int, int]) -> None:
        """Beside the current stream: on the one that is captured next, whose cuBLAS handle is then ready."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._run(*sizes)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
