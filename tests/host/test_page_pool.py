import random

import pytest

from fastkernels._library import _C


def test_pages_are_handed_out_once_and_come_back():
    pool = _C.PagePool(8)
    first, second = pool.allocate(5), pool.allocate(3)
    assert sorted(first + second) == list(range(8))
    assert pool.num_free == 0
    assert pool.allocate(1) == []
    pool.release(first)
    assert pool.num_free == 5
    assert sorted(pool.allocate(5)) == sorted(first)


def test_allocating_more_than_is_free_takes_nothing():
    pool = _C.PagePool(4)
    pool.allocate(2)
    assert pool.allocate(3) == []
    assert pool.num_free == 2


def test_a_shared_page_is_free_when_the_last_holder_lets_go():
    pool = _C.PagePool(4)
    pages = pool.allocate(2)
    pool.retain(pages)
    assert pool.references(pages[0]) == 2
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages)
    assert pool.num_free == 4
    assert pool.references(pages[0]) == 0


def test_the_page_freed_last_is_used_first():
    pool = _C.PagePool(8)
    pages = pool.allocate(4)
    pool.release([pages[2]])
    assert pool.allocate(1) == [pages[2]]


@pytest.mark.parametrize("operation", ["retain", "release"])
def test_a_free_or_unknown_page_is_refused_and_nothing_changes(operation):
    pool = _C.PagePool(4)
    pages = pool.allocate(2)
    with pytest.raises(ValueError, match="page 3 is free; only a held page is retained or released"):
        getattr(pool, operation)([pages[0], 3])
    with pytest.raises(ValueError, match="page 4 is not one of 4"):
        getattr(pool, operation)([pages[0], 4])
    with pytest.raises(ValueError, match="page -1 is not one of 4"):
        getattr(pool, operation)([pages[0], -1])
    assert [pool.references(p) for p in pages] == [1, 1]
    assert pool.num_free == 2


def test_releasing_a_page_twice_in_one_call_is_refused_and_nothing_changes():
    pool = _C.PagePool(4)
    pages = pool.allocate(3)
    with pytest.raises(ValueError, match="listed more often than it is held"):
        pool.release([pages[0], pages[1], pages[0]])
    assert [pool.references(p) for p in pages] == [1, 1, 1]
    assert pool.num_free == 1
    assert pool.allocate(1) == [3]


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one page, not 0"):
        _C.PagePool(0)
    with pytest.raises(ValueError, match="must not be negative, it is -1"):
        _C.PagePool(1).allocate(-1)


def test_random_operations_keep_the_books():
    rng = random.Random(0)
    pool = _C.PagePool(50)
    holders: list[list[int]] = []
    for _ in range(5000):
        action = rng.random()
        if action < 0.45:
            pages = pool.allocate(rng.randint(1, 6))
            if pages:
                holders.append(pages)
        elif action < 0.6 and holders:
            shared = list(rng.choice(holders))
            pool.retain(shared)
            holders.append(shared)
        elif holders:
            pool.release(holders.pop(rng.randrange(len(holders))))
        held = [page for pages in holders for page in pages]
        assert pool.num_free == 50 - len(set(held))
        for page in range(50):
            assert pool.references(page) == held.count(page)
