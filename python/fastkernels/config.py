"""What an engine is told: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastkernels.errors import SamplingError

if TYPE_CHECKING:
    import torch


class ConfigError(ValueError):
    """A configuration holds a value fastkernels does not take; the message names it and what is taken."""


class UnsupportedModelError(ConfigError):
    """The configuration is of a model fastkernels does not run; the message names those it does."""


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained context; formulas: ``models/rope_scaling.py``.

    kind:             which formula; "default" leaves the frequencies as they are and reads nothing else
    factor:           target context / trained context
    original_max_position_embeddings: the trained context, in tokens
    low_freq_factor, high_freq_factor: llama3: bounds of the blend, in turns over the trained context
    beta_fast, beta_slow: yarn: bounds of the ramp, in turns over the trained context
    truncate:         yarn: whether these bounds are rounded outwards to whole dimensions
    attention_factor: yarn: multiplies cos and sin; resolved from factor and mscale when config.json has none
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @classmethod
    def from_dict(cls, rope: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling:
        """From HF's ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5).

        Raises ConfigError for an unknown type, a missing key or a factor that is not positive.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise UnsupportedModelError(
                f"config.json asks for rope scaling {kind!r}; fastkernels knows {', '.join(ROPE_KINDS)}"
            )
        if kind == "default":
            return cls()
        original = int(rope.get("original_max_position_embeddings") or max_position_embeddings)
        if kind == "dynamic":
            original = max_position_embeddings  # what transformers grows from, whatever else is written
        factor = rope.get("factor")
        if factor is None and kind == "yarn":
            factor = max_position_embeddings / original
        factor = _positive_number(factor, f"the factor of rope scaling {kind!r}")
        if kind == "llama3":
            low = _positive_number(rope.get("low_freq_factor"), "llama3's low_freq_factor")
            high = _positive_number(rope.get("high_freq_factor"), "llama3's high_freq_factor")
            if high <= low:
                raise ConfigError(
                    f"config.json's rope scaling 'llama3' has high_freq_factor {high}, which must be above "
                    f"low_freq_factor {low}"
                )
            return cls("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
        if kind == "yarn":
            return cls(
                "yarn",
                factor,
                original,
                beta_fast=_positive_number(rope.get("beta_fast") or 32.0, "yarn's beta_fast"),
                beta_slow=_positive_number(rope.get("beta_slow") or 1.0, "yarn's beta_slow"),
                truncate=bool(rope.get("truncate", True)),
                attention_factor=_yarn_attention_factor(rope, factor),
            )
        return cls(kind, factor, original)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return _positive_number(rope["attention_factor"], "yarn's attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(float(rope["mscale"])) / mscale(float(rope["mscale_all_dim"]))
    return mscale(1.0)


@dataclass(frozen=True)
class _Family:
    """What an architecture fixes, or takes when its config.json is silent. None: config.json decides."""

    model_type: str
    attention_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None
    head_dim: int | None = None
    sliding_window: Literal["never", "always", "by use_sliding_window"] = "never"


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family(
        "mistral", attention_bias=False, o_bias=False, mlp_bias=False, sliding_window="always"
    ),
    "Qwen2ForCausalLM": _Family(
        "qwen2", attention_bias=True, o_bias=False, mlp_bias=False, sliding_window="by use_sliding_window"
    ),
    "Qwen3ForCausalLM": _Family(
        "qwen3", mlp_bias=False, head_dim=128, sliding_window="by use_sliding_window"
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder, in the words of this library; made from a HF config.json.

    sliding_window: one entry a layer: None, or the number of keys a token sees, itself included
    rotary_dim:     the leading dimensions of a head that are rotated; even, at most head_dim
    dtype:          of the weights as they were saved: "float32" | "float16" | "bfloat16"
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rotary_dim: int = 0  # 0: head_dim
    rope_interleaved: bool = False  # rotate dimensions (2i, 2i+1); otherwise (i, i + rotary_dim/2)
    rope_scaling: RopeScaling = RopeScaling()
    sliding_window: tuple[int | None, ...] = ()  # empty: no layer has one
    attention_bias: bool = False  # of the q, k and v projections
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_layers)
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json has {self.num_q_heads} attention heads over {self.num_kv_heads} key-value "
                "heads; "
                "the first must be a multiple of the second"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"config.json rotates {self.rotary_dim} of {self.head_dim} head dimensions; fastkernels "
                "takes an even "
                "number of them, at most all"
            )
        if len(self.sliding_window) != self.num_layers:
            raise ConfigError(
                f"config.json lists the attention of {len(self.sliding_window)} layers; the model has "
                f"{self.num_layers}"
            )

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch names it."""
        import torch  # here, so that reading a configuration does not need it

        return cast("torch.dtype", getattr(torch, self.dtype))

    @classmethod
    def from_dict(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """From a parsed config.json, of transformers 4 (``rope_theta``, ``torch_dtype``) or 5
        (``rope_parameters``).

        Raises UnsupportedModelError for an architecture, activation or rope scaling that fastkernels does not
        run, ConfigError for a missing or impossible value.
        """
        architecture = _architecture(hf)
        family = _FAMILIES[architecture]
        act = hf.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"config.json asks for the activation {act!r}; fastkernels takes 'silu'"
            )
        num_layers = _positive_int(hf, "num_hidden_layers")
        hidden_size = _positive_int(hf, "hidden_size")
        num_q_heads = _positive_int(hf, "num_attention_heads")
        head_dim = _positive_int(hf, "head_dim", family.head_dim or hidden_size // num_q_heads)
        max_position = _positive_int(hf, "max_position_embeddings")
        rope = _rope_parameters(hf)
        bias = bool(hf.get("attention_bias", False))
        return cls(
            architecture=architecture,
            model_type=family.model_type,
            vocab_size=_positive_int(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive_int(hf, "intermediate_size"),
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=_positive_int(hf, "num_key_value_heads", num_q_heads),
            head_dim=head_dim,
            max_position_embeddings=max_position,
            norm_eps=_positive_number(hf.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=_positive_number(rope.get("rope_theta") or 10000.0, "rope_theta"),
            rotary_dim=int(head_dim * float(rope.get("partial_rotary_factor") or 1.0)),
            rope_interleaved=bool(hf.get("rope_interleaved", False)),
            rope_scaling=RopeScaling.from_dict(rope, max_position),
            sliding_window=_sliding_window(hf, family, num_layers),
            attention_bias=bias if family.attention_bias is None else family.attention_bias,
            o_bias=bias if family.o_bias is None else family.o_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            hidden_act="silu",
            dtype=_dtype(hf),
            bos_token_id=_token_ids(hf, "bos_token_id")[0] if _token_ids(hf, "bos_token_id") else None,
            eos_token_ids=_token_ids(hf, "eos_token_id"),
        )


def known_architectures() -> tuple[str, ...]:
    """The ``architectures`` entries of config.json that ``ModelConfig.from_dict`` takes."""
    return tuple(_FAMILIES)


def _architecture(hf: Mapping[str, Any]) -> str:
    named = hf.get("architectures") or []
    if not named:  # a config.json written by hand: model_type says the same
        named = [name for name, family in _FAMILIES.items() if family.model_type == hf.get("model_type")]
    if not named or named[0] not in _FAMILIES:
        found = named[0] if named else hf.get("model_type", "none named")
        raise UnsupportedModelError(
            f"config.json names the architecture {found!r}; fastkernels knows {', '.join(_FAMILIES)}"
        )
    return str(named[0])


def _rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """One flat dictionary with rope_theta, partial_rotary_factor and the scaling, from either layout."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(
            f"config.json gives each layer type its own rope ({', '.join(rope)}); fastkernels takes one for "
            "all layers"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(key, hf.get(key))
    if hf.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return rope


def _sliding_window(hf: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    none: tuple[int | None, ...] = (None,) * num_layers
    if family.sliding_window == "never":
        return none
    if family.sliding_window == "by use_sliding_window" and not hf.get("use_sliding_window", False):
        return none
    window = hf.get("sliding_window", 4096)  # 4096: what transformers takes when the key is absent
    if window is None:
        return none
    window = _positive_int(hf, "sliding_window", 4096)
    kinds = hf.get("layer_types")
    if kinds is None:
        first = 0 if family.sliding_window == "always" else int(hf.get("max_window_layers", 28))
        return tuple(window if layer >= first else None for layer in range(num_layers))
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"config.json has a layer of type {kind!r}; fastkernels knows full_attention and "
                "sliding_attention"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(hf: Mapping[str, Any]) -> str:
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"config.json has dtype {name!r}; fastkernels takes {', '.join(DTYPES)}")
    return name


def _token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = hf.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"config.json has {key} = {value!r}; it must be a token id or a list of them")
    return tuple(ids)


def _positive_int(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json has no {key}")
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json has {key} = {value!r}; it must be a positive integer")
    return value


def _positive_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json has {value!r} for {what}; it must be a positive number")
    return float(value)


# --- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. None: the checkpoint's
    generation_config.json decides, else the value in brackets.

    max_tokens:         tokens to generate at most; from 1
    temperature:        0 takes the likeliest token; [0, or 1 where the checkpoint asks for sampling]
    top_k:              sample among the k likeliest tokens; 0 is off [0]
    top_p:              sample among the likeliest that hold this probability together; (0, 1] [1]
    min_p:              drop tokens less likely than min_p times the likeliest; [0, 1] [0]
    repetition_penalty: divides positive and multiplies negative logits of tokens that occurred; > 0 [1]
    presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and per
                                         occurrence
    seed:               the same seed gives the same text, whatever else runs; None draws one
    stop:               texts that end the output, which is cut before them
    stop_token_ids:     tokens that end the output, beside the checkpoint's own
    ignore_eos:         go on after the checkpoint's stop tokens
    logprobs:           how many of the likeliest tokens to report beside the chosen one; None reports none
    Raises SamplingError for a value outside its range.
    """

    max_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._integer("max_tokens", 1, 2**31 - 1)
        self._number("temperature", 0.0, math.inf)
        self._integer("top_k", 0, 2**31 - 1)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, math.inf, above=True)
        self._number("presence_penalty", -math.inf, math.inf)
        self._number("frequency_penalty", -math.inf, math.inf)
        self._integer("seed", -(2**63), 2**63 - 1)
        self._integer("logprobs", 0, MAX_LOGPROBS)
        if not all(isinstance(text, str) and text for text in stop):
            raise SamplingError(f"stop is {stop!r}; it must be texts of at least one character")
        if not all(type(token) is int and token >= 0 for token in self.stop_token_ids):
            raise SamplingError(f"stop_token_ids is {self.stop_token_ids!r}; they must be integers from 0")

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None and name != "max_tokens":
            return
        if type(value) is not int or not low <= value <= high:
            raise SamplingError(f"{name} is {value!r}; it must be an integer from {low} to {high}")

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if value is None and not name.endswith(("presence_penalty", "frequency_penalty")):
            return
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or not (low < value if above else low <= value) or value > high:
            bounds = f" {'above' if above else 'from'} {low:g}" if math.isfinite(low) else ""
            bounds += f" to {high:g}" if math.isfinite(high) else ""
            raise SamplingError(f"{name} is {value!r}; it must be a finite number{bounds}")


MAX_LOGPROBS = 64


# --- the engine ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at once, and on what.

    device:            "auto" (CUDA where there is a GPU and this build has kernels for it), "cuda", "cpu"
    dtype:             "auto" (the checkpoint's on CUDA, fp32 on the CPU), "bf16", "fp16", "fp32"
    max_seq_len:       tokens of a prompt and its output together; None: the model's, or what the KV cache
                       holds
    max_num_seqs:      requests that run at once
    max_num_tokens:    tokens of a step at most; longer prompts go in chunks
    page_size:         tokens of a KV cache page; a power of two
    kv_cache_bytes:    of the KV cache; None: kv_cache_fraction of the GPU memory that is left
    kv_cache_dtype:    "fp8" or "int8": bytes, with the checkpoint's scales; an engine's own "bf16", "fp16" or
                       "fp32"; "auto": as the checkpoint says, else the engine's own
    disabled_passes:   compiler passes to leave out
    cuda_graphs:       replay small steps as CUDA graphs
    random_weights:    seeded random weights at the model's shapes, for benchmarks
    quantization:      scheme that the weights of all linears but the head are rounded to as they are loaded:
                       "fp8", "fp8-block", "int8", "int8-weight", "int4", "nvfp4", "mxfp4"; more in
                       ``fastkernels.quantize``. None for a checkpoint that is quantised already, which is
                       loaded as it is
    head_quantization: the head's, "fp8-weight" say; None keeps it as it is
    Raises ConfigError for a value outside its range.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_seq_len: int | None = None
    max_num_seqs: int = 64
    max_num_tokens: int = 8192
    page_size: int = 16
    kv_cache_bytes: int | None = None
    kv_cache_fraction: float = 0.9
    kv_cache_dtype: str = "auto"
    disabled_passes: tuple[str, ...] = ()
    cuda_graphs: bool = True
    random_weights: bool = False
    quantization: str | None = None
    head_quantization: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "disabled_passes", tuple(self.disabled_passes))
        if self.device not in DEVICES and not self.device.removeprefix("cuda:").isdigit():
            raise ConfigError(f"device is {self.device!r}; it must be auto, cuda, cuda:<index> or cpu")
        if self.dtype not in ENGINE_DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(ENGINE_DTYPES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}; it must be one of {', '.join(KV_CACHE_DTYPES)}"
            )
        for name, low in (
            ("max_seq_len", 2),
            ("max_num_seqs", 1),
            ("max_num_tokens", 1),
            ("kv_cache_bytes", 1),
        ):
            value = getattr(self, name)
            if value is None and name in ("max_seq_len", "kv_cache_bytes"):
                continue
            if type(value) is not int or not low <= value < 2**63:
                raise ConfigError(f"{name} is {value!r}; it must be an integer from {low}")
        if type(self.page_size) is not int or self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size is {self.page_size!r}; it must be a power of two")
        if not 0 < self.kv_cache_fraction <= 1:
            raise ConfigError(
                f"kv_cache_fraction is {self.kv_cache_fraction!r}; it must lie above 0 and be at most 1"
            )


DEVICES = ("auto", "cuda", "cpu")
ENGINE_DTYPES = ("auto", "bf16", "fp16", "fp32")
KV_CACHE_DTYPES = (*ENGINE_DTYPES, "fp8", "int8")


# --- the environment ------------------------------------------------------------------------------------


def debug() -> bool:
    """Whether FASTKERNELS_DEBUG is set: checks that cost time (page ids against the cache, say) are made."""
    return os.environ.get("FASTKERNELS_DEBUG", "") not in ("", "0")


TuneMode = Literal["off", "cached", "full"]
TUNE_MODES: tuple[TuneMode, ...] = ("off", "cached", "full")


def tune_mode() -> TuneMode:
    """FASTKERNELS_TUNE: where an engine's tactics come from, "cached" by default; see ``compiler/tune``.

    Raises ConfigError for another value.
    """
    named = os.environ.get("FASTKERNELS_TUNE") or "cached"
    for mode in TUNE_MODES:
        if mode == named:
            return mode
    raise ConfigError(f"FASTKERNELS_TUNE is {named!r}; it must be one of {', '.join(TUNE_MODES)}")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastkernels, or ~/.cache/fastkernels."""
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "fastkernels"
