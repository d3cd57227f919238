"""Which tokens of which requests go into the next step: in-flight batching with chunked prefill.

Pure Python and numpy: no torch, no device. One budget of max_num_tokens tokens a step is given to the decodes
first, then to the chunks of prompts already begun, then to new requests in order of arrival, as far as rows
and pages reach. When a running request needs a page and none is free, the one that arrived last gives up its
pages and its row, goes to the front of the queue and is computed again later (preemption by recompute).
Nobody overtakes the head of the queue, so every request is served at last.

The host plans a step before it has read what the step before sampled. A request therefore counts its tokens
(``num_tokens``) apart from those the host knows (``num_known``): they differ by the one still on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from fastkernels.runtime.kv_cache import KVCache


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of one request.

    tokens:       i32 [max_num_tokens]; the prompt and what was sampled after it; num_known are valid
    num_tokens:   tokens there are, one still unread on the device included; at max_num_tokens it is complete
    num_computed: leading tokens whose keys and values are in the cache, once the steps given out so far have
                  run
    """

    request_id: int
    tokens: np.ndarray
    num_prompt_tokens: int
    max_num_tokens: int
    num_tokens: int = 0
    num_known: int = 0
    num_computed: int = 0
    row: int = -1  # in the page table; -1 while it waits
    pending_row: int = -1  # logits row of the last step that sampled it; -1: the token is known
    num_scheduled: int = 0  # tokens in the step being planned
    num_preemptions: int = 0
    finished: bool = False

    @classmethod
    def from_prompt(cls, request_id: int, prompt: Iterable[int], max_new_tokens: int) -> Request:
        prompt_ids = np.asarray(prompt, dtype=np.int32)
        num_prompt = len(prompt_ids)
        tokens = np.empty(num_prompt + max_new_tokens, dtype=np.int32)
        tokens[:num_prompt] = prompt_ids
        return cls(request_id, tokens, num_prompt, len(tokens), num_prompt, num_prompt)

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens that the host knows."""
        return self.num_known - self.num_prompt_tokens


@dataclass(slots=True)
class Batch:
    """One step, by rows in ascending order.

    requests: those with tokens in this step
    starts, counts, sampled: of each, its first token, how many tokens, and whether the last is among them
    samples:  those of which it is, in the order of their logits rows
    admitted: those that were given a row in this step
    """

    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[Request] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    num_tokens: int = 0
    decodes_only: bool = True  # every request has one token, and samples


class Scheduler:
    """Owns the queue, the rows and the page lists.

    ``schedule`` gives out a step and counts it as computed; ``append`` tells what it sampled; ``finish`` ends
    a request wherever it is. A request that is finished while a step with it is under way simply has the
    token of that step dropped: its pages can be handed out at once, because the device works off steps in
    order.
    """

    def __init__(self, kv_cache: KVCache, *, max_num_seqs: int, max_num_tokens: int) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.rows: list[Request | None] = [None] * max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))  # a stack, lowest row first
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def max_request_tokens(self) -> int:
        """Tokens of the longest request the pages hold when it is alone."""
        return self.kv_cache.num_pages * self.kv_cache.page_size

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue. It must fit the cache when it is alone."""
        if request.max_num_tokens > self.max_request_tokens:
            raise ValueError(
                f"a request of up to {request.max_num_tokens} tokens does not fit the KV cache, which holds "
                f"{self.max_request_tokens}"
            )
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Ends a request, running or waiting; row and pages are free at once. Twice is harmless."""
        if request.finished:
            return
        request.finished = True
        if request.row >= 0:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def preempt(self, request: Request) -> None:
        """Takes a running request's row and pages and puts it at the front of the queue."""
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_scheduled = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def borrow_row(self, num_tokens: int) -> int | None:
        """A free row with pages for num_tokens tokens, outside of the queue; None when there is none now."""
        if not self._free_rows or not self.kv_cache.append(self._free_rows[-1], num_tokens):
            return None
        return self._free_rows.pop()

    def return_row(self, row: int) -> None:
        """Gives back a borrowed row and its pages."""
        self.kv_cache.free(row)
        self._free_rows.append(row)

    def schedule(self) -> Batch:
        """The next step; one without tokens when nothing can run until ``append`` was called for the last."""
        budget = self.max_num_tokens
        page_size, pages, running = self.kv_cache.page_size, self.kv_cache.pages, self.running
        prefilling = False
        index = 0
        # Preemption takes from the end of `running`, so what lies before index stays in place.
        while index < len(running) and budget:
            request = running[index]
            index += 1
            if request.num_tokens - request.num_computed != 1:
                prefilling = True
                continue
            if request.num_tokens == request.max_num_tokens:
                continue  # complete, the host only has to read its last token
            if request.num_tokens > len(pages[request.row]) * page_size and not self._make_room(request):
                continue
            request.num_scheduled = 1
            budget -= 1
        index = 0
        while prefilling and index < len(running) and budget:
            request = running[index]
            index += 1
            if request.num_tokens - request.num_computed > 1:  # its pages were taken when it was admitted
                request.num_scheduled = min(request.num_tokens - request.num_computed, budget)
                budget -= request.num_scheduled
        admitted: list[Request] = []
        if self.waiting and budget:
            admitted = self._admit(budget)
        return self._batch(admitted)

    def append(self, request: Request, token_id: int) -> None:
        """Notes the token that a step sampled, in the order of the steps."""
        request.tokens[request.num_known] = token_id
        request.num_known += 1

    def _make_room(self, request: Request) -> bool:
        """Room for the request's next token; False when it was the last to arrive and was preempted."""
        while not self.kv_cache.append(request.row, request.num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, budget: int) -> list[Request]:
        admitted = []
        while self.waiting and self._free_rows and budget:
            request = self.waiting[0]
            if request.num_known != request.num_tokens:
                break  # preempted a moment ago: the host has not read its last token yet
            # All its pages at once, since half a prompt in the cache helps nobody; and a page left over for
            # each running request, so that it is not preempted again in the next steps.
            row = self._free_rows[-1]
            missing = self.kv_cache.pages_for(request.num_tokens)
            if self.running and self.kv_cache.num_free < missing + len(self.running):
                break
            if not self.kv_cache.append(row, request.num_tokens):
                break
            self._free_rows.pop()
            self.waiting.popleft()
            request.row = row
            request.pending_row = -1
            self.rows[row] = request
            self._insert_running(request)
            request.num_scheduled = min(request.num_tokens, budget)
            budget -= request.num_scheduled
            admitted.append(request)
        return admitted

    def _insert_running(self, request: Request) -> None:
        position = len(self.running)
        while position and self.running[position - 1].request_id > request.request_id:
            position -= 1
        self.running.insert(position, request)

    def _batch(self, admitted: list[Request]) -> Batch:
        batch = Batch(admitted=admitted)
        requests, starts, counts, samples = batch.requests, batch.starts, batch.counts, batch.samples
        for request in self.rows:
            if request is None or not request.num_scheduled:
                continue
            count = request.num_scheduled
            start = request.num_computed
            request.num_scheduled = 0
            request.num_computed = start + count
            requests.append(request)
            starts.append(start)
            counts.append(count)
            batch.num_tokens += count
            samples_now = start + count == request.num_tokens
            batch.sampled.append(samples_now)
            if samples_now:
                samples.append(request)
                request.num_tokens += 1
            if count != 1 or not samples_now:
                batch.decodes_only = False
        return batch

    def _release(self, request: Request) -> None:
        self.kv_cache.free(request.row)
        self.rows[request.row] = None
        self._free_rows.append(request.row)
        request.row = -1
