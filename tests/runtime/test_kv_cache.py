import pytest

from fastkernels.runtime.kv_cache import KVCache


def test_pages_grow_with_the_tokens_and_come_back():
    cache = KVCache(num_pages=10, page_size=16, max_num_seqs=2)
    assert cache.append(0, 1) and len(cache.pages[0]) == 1
    assert cache.append(0, 16) and len(cache.pages[0]) == 1
    assert cache.append(0, 17) and len(cache.pages[0]) == 2
    assert cache.append(1, 128) and len(cache.pages[1]) == 8
    assert not set(cache.pages[0]) & set(cache.pages[1])
    assert cache.num_used == 10
    cache.free(1)
    assert (cache.num_used, cache.num_free, cache.pages[1]) == (2, 8, [])


def test_running_out_changes_nothing():
    cache = KVCache(num_pages=4, page_size=16, max_num_seqs=2)
    assert cache.append(0, 48)
    before = list(cache.pages[0])
    assert not cache.append(0, 16 * 5)
    assert cache.pages[0] == before
    assert cache.num_free == 1


def test_shared_pages_stay_until_the_last_row_lets_go():
    cache = KVCache(num_pages=6, page_size=16, max_num_seqs=3)
    cache.append(0, 40)
    cache.share(1, cache.pages[0][:2])
    assert cache.append(1, 48)
    assert cache.pages[1][:2] == cache.pages[0][:2] and cache.pages[1][2] != cache.pages[0][2]
    assert cache.num_used == 4
    cache.free(0)
    assert cache.num_used == 3
    cache.free(1)
    assert cache.num_used == 0


def test_only_an_empty_row_shares():
    cache = KVCache(num_pages=6, page_size=16, max_num_seqs=2)
    cache.append(0, 16)
    cache.append(1, 16)
    with pytest.raises(ValueError, match="row 1 already holds 1 pages; only an empty row can share"):
        cache.share(1, cache.pages[0])


def test_changes_name_row_and_first_page():
    cache = KVCache(num_pages=6, page_size=16, max_num_seqs=2)
    cache.append(1, 16)
    cache.append(1, 20)
    assert cache.changes == [(1, 0), (1, 1)]
