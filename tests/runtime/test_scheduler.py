"""The scheduler alone: a fake device samples, and every step is checked against what must hold."""

import random
from collections import Counter, deque

import numpy as np
import pytest

from fastkernels.runtime.kv_cache import KVCache
from fastkernels.runtime.scheduler import Batch, Request, Scheduler


class FakeDevice:
    """Runs steps `lag` behind the host, and keeps by page and offset which token was written there."""

    def __init__(self, num_pages=64, page_size=4, max_num_seqs=8, max_num_tokens=32, lag=1):
        self.cache = KVCache(num_pages, page_size, max_num_seqs)
        self.scheduler = Scheduler(self.cache, max_num_seqs=max_num_seqs, max_num_tokens=max_num_tokens)
        self.lag = lag
        self.under_way: deque[list[Request]] = deque()
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.next_id = 0
        self.live: list[Request] = []
        self.finished: list[Request] = []

    def add(self, num_prompt: int, max_new: int) -> Request:
        prompt = [(self.next_id * 1000 + i) % 30000 for i in range(num_prompt)]
        request = Request.from_prompt(self.next_id, prompt, max_new)
        self.next_id += 1
        self.scheduler.add(request)
        self.live.append(request)
        return request

    def step(self) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        self.under_way.append(list(batch.samples))
        while len(self.under_way) > self.lag or (self.under_way and not batch.num_tokens):
            self.read(self.under_way.popleft())
        return batch

    def read(self, samples: list[Request]) -> None:
        for request in samples:
            if request.finished:
                continue
            self.scheduler.append(request, 7)
            if request.num_known == request.max_num_tokens:
                self.end(request)

    def end(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.live.remove(request)
        self.finished.append(request)

    def check(self, batch: Batch) -> None:
        assert batch.num_tokens == sum(batch.counts) <= self.scheduler.max_num_tokens
        assert [r.row for r in batch.requests] == sorted({r.row for r in batch.requests})
        assert [r for r in batch.requests if r in batch.samples] == batch.samples
        size = self.cache.page_size
        for request, start, count in zip(batch.requests, batch.starts, batch.counts, strict=True):
            assert not request.finished and count > 0
            pages = self.cache.pages[request.row]
            assert len(pages) * size >= start + count
            for token in range(start, start + count):
                self.memory[pages[token // size], token % size] = (request.request_id, token)
            # What attention reads: every token of this sequence, and none of another.
            for token in range(start + count):
                assert self.memory[pages[token // size], token % size] == (request.request_id, token)
            assert start + count == (
                request.num_tokens - 1 if request in batch.samples else request.num_computed
            )
        self.check_books()

    def check_books(self) -> None:
        scheduler = self.scheduler
        held = Counter(page for pages in self.cache.pages for page in pages)
        for page in range(self.cache.num_pages):
            assert self.cache.pool.references(page) == held[page] <= 1
        assert self.cache.num_free == self.cache.num_pages - len(held)
        assert {id(r) for r in self.live} == {id(r) for r in [*scheduler.running, *scheduler.waiting]}
        for row, request in enumerate(scheduler.rows):
            assert (request is None) == (not self.cache.pages[row])
            assert request is None or (request.row == row and request in scheduler.running)
        assert all(r.row == -1 for r in scheduler.waiting)
        arrivals = [r.request_id for r in scheduler.running]
        assert arrivals == sorted(arrivals)
        arrivals = [r.request_id for r in scheduler.waiting]
        assert arrivals == sorted(arrivals)

    def run_dry(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work and self.cache.num_used == 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_operations(seed, lag):
    rng = random.Random(seed)
    device = FakeDevice(
        num_pages=rng.choice([12, 24, 40]),
        max_num_seqs=rng.choice([3, 8]),
        max_num_tokens=rng.choice([7, 32]),
        lag=lag,
    )
    operations = Counter()
    limit = device.scheduler.max_request_tokens
    for _ in range(10_000 // 4):
        action = rng.random()
        if action < 0.25 and len(device.live) < 20:
            total = rng.randint(2, min(limit, 40))
            num_prompt = rng.randint(1, total - 1)
            device.add(num_prompt, total - num_prompt)
            operations["add"] += 1
        elif action < 0.32 and device.live:
            device.end(rng.choice(device.live))  # aborted, or stopped by a token
            operations["end"] += 1
        elif action < 0.36 and device.scheduler.running:
            device.scheduler.preempt(device.scheduler.running[-1])
            operations["preempt"] += 1
        else:
            device.step()
            operations["step"] += 1
        device.check_books()
    device.run_dry()
    assert min(operations[name] for name in ("add", "end", "preempt", "step")) >= 30
    assert device.scheduler.num_preemptions > operations["preempt"], "pages never ran out"
    assert sum(r.num_known == r.max_num_tokens for r in device.finished) > 100


def test_decodes_come_first_and_prompts_share_what_is_left():
    device = FakeDevice(max_num_tokens=10, lag=0)
    first = device.add(4, 8)
    device.step()
    second, third = device.add(12, 4), device.add(5, 4)
    batch = device.step()
    assert dict(zip((r.request_id for r in batch.requests), batch.counts, strict=True)) == {0: 1, 1: 9}
    batch = device.step()
    assert dict(zip((r.request_id for r in batch.requests), batch.counts, strict=True)) == {0: 1, 1: 3, 2: 5}
    assert batch.samples == [first, second, third]


@pytest.mark.parametrize("budget", [1, 7, 32])
def test_a_prompt_is_computed_once_in_chunks_of_the_budget(budget):
    device = FakeDevice(max_num_tokens=budget, lag=0)
    device.add(20, 1)
    chunks = []
    while device.scheduler.has_work:
        chunks += device.step().counts
    assert sum(chunks) == 20 and chunks[0] == min(budget, 20)


def test_the_last_arrived_is_preempted_and_first_to_come_back():
    device = FakeDevice(num_pages=6, page_size=4, max_num_seqs=4, lag=0)
    old, young = device.add(7, 12), device.add(7, 12)
    device.step()
    waiting = device.add(3, 2)
    while not device.scheduler.num_preemptions:
        device.step()
    assert young.row == -1 and old.row >= 0
    assert list(device.scheduler.waiting) == [young, waiting]
    num_known = young.num_known
    assert young.num_computed == 0 and num_known > 7
    device.run_dry()
    assert device.finished[0] is old
    assert young.num_known == 19 and old.num_preemptions == 0


def test_a_complete_request_is_not_scheduled_again_while_its_last_token_is_under_way():
    device = FakeDevice(lag=1)
    device.add(4, 2)
    counts = [device.step().counts for _ in range(3)]
    assert counts == [[4], [1], []]
    assert not device.scheduler.has_work


def test_nobody_overtakes_the_head_of_the_queue():
    device = FakeDevice(num_pages=8, page_size=4, lag=0)
    device.add(16, 4)
    device.step()
    big, small = device.add(20, 2), device.add(2, 2)
    device.step()
    assert list(device.scheduler.waiting) == [big, small]
    device.run_dry()
    assert device.finished[0].request_id == 0


def test_a_request_larger_than_the_cache_is_refused():
    device = FakeDevice(num_pages=8, page_size=4)
    with pytest.raises(ValueError, match="up to 33 tokens does not fit the KV cache, which holds 32"):
        device.add(30, 3)
    assert not device.scheduler.has_work


def test_finishing_twice_is_harmless():
    device = FakeDevice()
    request = device.add(4, 4)
    device.step()
    device.scheduler.finish(request)
    device.scheduler.finish(request)
    assert device.cache.num_used == 0


def test_tokens_are_kept_in_order():
    request = Request.from_prompt(0, [5, 6], 2)
    scheduler = Scheduler(KVCache(4, 4, 1), max_num_seqs=1, max_num_tokens=8)
    scheduler.append(request, 8)
    scheduler.append(request, 9)
    assert np.array_equal(request.tokens, [5, 6, 8, 9])
    assert request.num_output_tokens == 2
