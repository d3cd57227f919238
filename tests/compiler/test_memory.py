"""The arena: nothing that is alive together overlaps, and it is much smaller than the sum."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkernels.compiler import PASSES, arena_layout, compile_model
from fastkernels.compiler.memory import ALIGNMENT_BYTES, Lifetime, arena_lifetimes, place
from fastkernels.models.presets import PRESETS
from tests.compiler.configs import CONFIGS


def _check(lifetimes: list[Lifetime], offsets: dict[str, int], size_bytes: int) -> None:
    assert set(offsets) == {life.name for life in lifetimes}
    for index, one in enumerate(lifetimes):
        begin, end = offsets[one.name], offsets[one.name] + one.size_bytes
        assert begin % ALIGNMENT_BYTES == 0 and begin >= 0 and end <= size_bytes
        for other in lifetimes[:index]:
            if one.first <= other.last and other.first <= one.last:
                other_begin = offsets[other.name]
                assert end <= other_begin or other_begin + other.size_bytes <= begin, (one, other)


@st.composite
def _lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    drawn = draw(
        st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 12)), max_size=40)
    )
    return [Lifetime(f"b{i}", size, first, first + length) for i, (size, first, length) in enumerate(drawn)]


@settings(max_examples=300, deadline=None)
@given(_lifetimes())
def test_no_two_live_buffers_overlap(lifetimes):
    offsets, size_bytes = place(lifetimes)
    _check(lifetimes, offsets, size_bytes)
    by_step = [sum(life.size_bytes for life in lifetimes if life.first <= t <= life.last) for t in range(43)]
    assert size_bytes >= max(by_step)


def test_disjoint_lifetimes_share_one_place():
    offsets, size_bytes = place([Lifetime("a", 1000, 0, 1), Lifetime("b", 900, 2, 3), Lifetime("c", 1, 4, 4)])
    assert offsets == {"a": 0, "b": 0, "c": 0}
    assert size_bytes == 1024


@pytest.mark.parametrize("disabled", [(), tuple(PASSES), ("select_rows",)])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_arena_of_a_plan(name, disabled):
    plan = compile_model(CONFIGS[name], disabled_passes=disabled)
    sizes = {"max_num_tokens": 77, "max_num_seqs": 5, "element_bytes": 4}
    layout = arena_layout(plan, **sizes)
    lifetimes = arena_lifetimes(plan, **sizes)
    _check(lifetimes, dict(layout.offsets), layout.size_bytes)
    assert {life.name for life in lifetimes} == {
        buffer.name for buffer in plan.buffers.values() if buffer.kind == "arena"
    }


@pytest.mark.parametrize("name", PRESETS)
def test_the_arena_of_a_released_model_is_a_small_part_of_the_sum(name):
    plan = compile_model(PRESETS[name])
    layout = arena_layout(plan, max_num_tokens=8192, max_num_seqs=64, element_bytes=2)
    assert layout.size_bytes * 15 < layout.unshared_bytes


def test_what_the_head_reads_outlives_its_first_run():
    plan = compile_model(CONFIGS["llama"])
    lifetimes = {
        life.name: life for life in arena_lifetimes(plan, max_num_tokens=8, max_num_seqs=8, element_bytes=4)
    }
    hidden = plan.root(plan.steps[plan.head_start].inputs[0]).name
    assert lifetimes[hidden].last == lifetimes["logits"].last == len(plan.steps)
