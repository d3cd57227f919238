"""generation_config.json: the stop tokens and sampling defaults a checkpoint asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.config import ModelConfig


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults for requests that say nothing themselves. None: the checkpoint says nothing either.

    eos_token_ids: every token that ends a text: generation_config.json's, then those only config.json has
    do_sample:     False: greedy, whatever temperature and the rest say, as in transformers
    """

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_generation_config(folder: str | Path, config: ModelConfig) -> GenerationConfig:
    """From the checkpoint folder; where it has no generation_config.json, the stop tokens of ``config``
    alone.

    Raises CheckpointError for broken JSON or a value outside its range, naming both.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return GenerationConfig(eos_token_ids=config.eos_token_ids)
    values = read_json_object(path)

    def number(key: str, takes: Callable[[float], bool], range_text: str) -> Any:
        value = values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not takes(value):
            raise CheckpointError(f"{path} has {key} = {value!r}; it must be {range_text}")
        return value

    do_sample = values.get("do_sample")
    if do_sample not in (None, True, False):
        raise CheckpointError(f"{path} has do_sample = {do_sample!r}; it must be true or false")
    return GenerationConfig(
        eos_token_ids=_merged_eos(path, values.get("eos_token_id"), config.eos_token_ids),
        do_sample=bool(do_sample),
        temperature=number("temperature", lambda t: 0 <= t < math.inf, "a number from 0"),
        top_k=number("top_k", lambda k: isinstance(k, int) and k >= 0, "an integer from 0 (0: no limit)"),
        top_p=number("top_p", lambda p: 0 < p <= 1, "a number in (0, 1]"),
        min_p=number("min_p", lambda p: 0 <= p <= 1, "a number in [0, 1]"),
        repetition_penalty=number("repetition_penalty", lambda r: 0 < r < math.inf, "a positive number"),
    )


def _merged_eos(path: Path, value: Any, from_config: tuple[int, ...]) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path} has eos_token_id = {value!r}; it must be a token id or a list of them")
    return tuple(dict.fromkeys([*ids, *from_config]))
