"""The arithmetic of an engine's memory."""

import pytest

from fastkernels.compiler import EngineMemoryError, Ledger, compile_model, format_bytes
from fastkernels.compiler.ledger import estimate, kv_bytes_per_page
from fastkernels.models.presets import PRESETS

LEDGER = Ledger(
    weights_bytes=1000,
    arena_bytes=200,
    workspaces_bytes=30,
    graphs_bytes=4,
    kv_bytes_per_page=100,
    page_size=16,
)


def test_pages_take_what_is_left():
    assert LEDGER.fixed_bytes == 1234
    assert LEDGER.kv_pages_that_fit(1234 + 799) == 7
    assert LEDGER.with_pages(7).total_bytes == 1934


def test_what_does_not_fit_is_refused_with_the_sum():
    message = (
        r"no memory for the KV cache: weights 1,000 B \+ arena 200 B \+ workspaces 30 B \+ graphs 4 B \+ "
        r"1 KV pages of 16 tokens x 100 B = 100 B: together 1.30 KiB, 1 bytes more than the 1.30 KiB"
    )
    with pytest.raises(EngineMemoryError, match=message):
        LEDGER.kv_pages_that_fit(1333)
    with pytest.raises(EngineMemoryError, match=r"together 2\.08 KiB, 634 bytes more"):
        LEDGER.kv_pages_that_fit(1500, at_least=9)
    assert issubclass(EngineMemoryError, MemoryError)


def test_without_a_limit_there_is_nothing_to_divide():
    with pytest.raises(ValueError, match="needs available_bytes"):
        LEDGER.kv_pages_that_fit()


def test_estimate_of_a_released_model():
    """Llama 3.1 8B has 8,030,261,248 parameters, and 128 KiB of keys and values a token in 16 bits."""
    plan = compile_model(PRESETS["llama-3.1-8b"])
    ledger = estimate(
        plan,
        max_num_tokens=8192,
        max_num_seqs=64,
        max_seq_len=4096,
        page_size=16,
        element_bytes=2,
        workspaces_bytes=7,
    )
    assert ledger.weights_bytes == 2 * 8_030_261_248
    assert ledger.kv_bytes_per_page == kv_bytes_per_page(plan, 16, 2) == 16 * 128 * 1024
    assert ledger.workspaces_bytes == 7 + 4096 * 128 * 4


@pytest.mark.parametrize("cache", ["float8_e4m3fn", "int8"])
def test_a_page_of_bytes_is_half_as_large(cache):
    plan = compile_model(PRESETS["llama-3.1-8b"], kv_cache=cache)
    assert [kv_bytes_per_page(plan, 16, size) for size in (2, 4)] == [16 * 64 * 1024] * 2
    plain = compile_model(PRESETS["llama-3.1-8b"], kv_cache=cache, disabled_passes=["quantize_kv"])
    assert kv_bytes_per_page(plain, 16, 2) == 16 * 128 * 1024


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.50 KiB"), (5 << 40, "5.00 TiB")]
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text
