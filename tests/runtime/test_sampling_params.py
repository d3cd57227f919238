import math

import pytest

from fastkernels.config import ConfigError, EngineConfig, SamplingParams
from fastkernels.errors import SamplingError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_tokens", 0, "max_tokens is 0; it must be an integer from 1"),
        ("max_tokens", None, "max_tokens is None; it must be an integer from 1"),
        ("max_tokens", 2.0, "max_tokens is 2.0; it must be an integer"),
        ("temperature", NAN, "temperature is nan; it must be a finite number from 0"),
        ("temperature", -0.5, "temperature is -0.5; it must be a finite number from 0"),
        ("temperature", INF, "temperature is inf; it must be a finite number"),
        ("top_k", -1, "top_k is -1; it must be an integer from 0"),
        ("top_p", 0.0, "top_p is 0.0; it must be a finite number above 0 to 1"),
        ("top_p", 1.5, "top_p is 1.5; it must be a finite number above 0 to 1"),
        ("top_p", NAN, "top_p is nan"),
        ("min_p", -0.1, "min_p is -0.1; it must be a finite number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be a finite number above 0"),
        ("presence_penalty", NAN, "presence_penalty is nan; it must be a finite number"),
        ("presence_penalty", None, "presence_penalty is None; it must be a finite number"),
        ("frequency_penalty", INF, "frequency_penalty is inf; it must be a finite number"),
        ("seed", 1.5, "seed is 1.5; it must be an integer"),
        ("logprobs", -1, "logprobs is -1; it must be an integer from 0 to 64"),
        ("stop", ("",), "texts of at least one character"),
        ("stop_token_ids", (-3,), "they must be integers from 0"),
    ],
)
def test_values_outside_their_range_are_refused(name, value, sentence):
    with pytest.raises(SamplingError, match=sentence):
        SamplingParams(**{name: value})


def test_one_stop_text_is_a_tuple_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop_token_ids == (3,)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("device", "tpu", "device is 'tpu'; it must be auto, cuda, cuda:<index> or cpu"),
        ("dtype", "int8", "dtype is 'int8'; it must be one of auto, bf16, fp16, fp32"),
        ("max_seq_len", 1, "max_seq_len is 1; it must be an integer from 2"),
        ("max_num_seqs", 0, "max_num_seqs is 0; it must be an integer from 1"),
        ("max_num_tokens", 0, "max_num_tokens is 0; it must be an integer from 1"),
        ("page_size", 24, "page_size is 24; it must be a power of two"),
        ("kv_cache_bytes", -1, "kv_cache_bytes is -1; it must be an integer from 1"),
        ("kv_cache_fraction", 0.0, "kv_cache_fraction is 0.0; it must lie above 0"),
    ],
)
def test_engine_values_outside_their_range_are_refused(name, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        EngineConfig(**{name: value})
