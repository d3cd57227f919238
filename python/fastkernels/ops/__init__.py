"""Ops for any torch model: one function a kernel, each also torch.ops.fastkernels.<name>."""

from fastkernels import _library  # noqa: F401  (loads the kernels before any op is named)
from fastkernels.ops.activation import gelu_mul, silu_mul
from fastkernels.ops.embedding import embedding, gather_rows, resolve_token_ids
from fastkernels.ops.kv_cache import append_kv
from fastkernels.ops.norm import add_rms_norm, layer_norm, rms_norm
from fastkernels.ops.rope import rope, rope_append_kv
from fastkernels.ops.sampling import IN_PROMPT, count_tokens, penalize, sample, top_logprobs

__all__ = [
    "IN_PROMPT",
    "add_rms_norm",
    "append_kv",
    "count_tokens",
    "embedding",
    "gather_rows",
    "gelu_mul",
    "layer_norm",
    "penalize",
    "resolve_token_ids",
    "rms_norm",
    "rope",
    "rope_append_kv",
    "sample",
    "silu_mul",
    "top_logprobs",
]
