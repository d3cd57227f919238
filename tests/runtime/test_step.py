"""The block of a step: what the host writes is what the device reads, at addresses that never change."""

import numpy as np
import pytest
import torch

from fastkernels.runtime.kv_cache import KVCache
from fastkernels.runtime.pack import StepPacker
from fastkernels.runtime.scheduler import Request, Scheduler
from fastkernels.runtime.step import HostStep, StepBuffers

FIELDS = HostStep.__slots__


@pytest.fixture
def buffers(device: torch.device) -> StepBuffers:
    return StepBuffers(max_num_tokens=37, max_num_seqs=5, max_pages_per_seq=11, device=device)


def test_every_field_arrives_and_none_overlaps_another(buffers: StepBuffers) -> None:
    for turn in range(3):
        host = buffers.advance()
        for number, name in enumerate(FIELDS):
            getattr(host, name)[...] = 100 * turn + number
        buffers.upload(buffers.max_pages_per_seq)
        for number, name in enumerate(FIELDS):
            field = getattr(buffers, name)
            assert field.shape == getattr(host, name).shape
            assert (field == 100 * turn + number).all(), name


def test_fields_lie_on_64_bytes_and_stay(buffers: StepBuffers) -> None:
    addresses = {name: getattr(buffers, name).data_ptr() for name in FIELDS}
    assert all((address - addresses["slot_mapping"]) % 64 == 0 for address in addresses.values())
    buffers.advance()
    buffers.upload(1)
    assert addresses == {name: getattr(buffers, name).data_ptr() for name in FIELDS}


def test_the_page_table_is_pages_major_and_last(buffers: StepBuffers) -> None:
    assert buffers.page_table.shape == (5, 11) and buffers.page_table.stride() == (1, 5)
    assert buffers.page_table.data_ptr() == max(getattr(buffers, name).data_ptr() for name in FIELDS)


def test_a_fresh_block_is_all_padding(buffers: StepBuffers) -> None:
    host = buffers.advance()
    assert (host.slot_mapping == -1).all() and (host.slots == -1).all()
    assert (host.seq_lens == 0).all() and (host.cu_seqlens_q == 0).all()


def test_packing_prompts_decodes_and_padding() -> None:
    buffers = StepBuffers(max_num_tokens=16, max_num_seqs=3, max_pages_per_seq=4, device="cpu")
    cache = KVCache(num_pages=12, page_size=4, max_num_seqs=3)
    scheduler, packer = Scheduler(cache, max_num_seqs=3, max_num_tokens=9), StepPacker(buffers, cache)
    first, second = Request.from_prompt(0, [11, 12, 13, 14, 15], 4), Request.from_prompt(1, range(20, 28), 4)
    scheduler.add(first)
    scheduler.add(second)
    packer.pack(scheduler.schedule(), 9)  # five tokens of the first, four of the second
    pages = packer.pack(scheduler.schedule(), 12)  # a decode, four tokens of the second, padding
    host = buffers.host
    assert pages == 2
    assert host.token_ids[:12].tolist() == [-1, 24, 25, 26, 27, *[0] * 7]
    assert host.positions[:12].tolist() == [5, 4, 5, 6, 7, *[0] * 7]
    assert host.cu_seqlens_q.tolist() == [0, 1, 5, 5]
    assert host.seq_lens.tolist() == [6, 8, 0]
    assert host.logits_indices.tolist() == [0, 4, 0]
    expected = [cache.pages[0][1] * 4 + 1, *(cache.pages[1][1] * 4 + offset for offset in range(4))]
    assert host.slot_mapping[:12].tolist() == [*expected, *[-1] * 7]
    for row in (0, 1):
        assert np.array_equal(host.page_table[row, :2], cache.pages[row])
