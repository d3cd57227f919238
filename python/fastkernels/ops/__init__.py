"""Ops for any torch model: one function a kernel, each also torch.ops.fastkernels.<name>."""

from fastkernels import _library  # noqa: F401  (loads the kernels before any op is named)
from fastkernels.ops.activation import gelu_mul, gelu_mul_quant, silu_mul, silu_mul_quant
from fastkernels.ops.attention import attention, paged_attention
from fastkernels.ops.attention_plan import AttentionPlan, attention_plan_sizes, plan_attention
from fastkernels.ops.embedding import embedding, gather_rows, resolve_token_ids
from fastkernels.ops.gemm import LINEAR_MAX_TOKENS, linear, linear_silu_mul
from fastkernels.ops.kv_cache import append_kv, copy_pages
from fastkernels.ops.norm import add_rms_norm, add_rms_norm_quant, layer_norm, rms_norm, rms_norm_quant
from fastkernels.ops.quant import quantize, quantize_zeros
from fastkernels.ops.quantized_gemm import interleave_rows, interleaves, quantized_linear, row_sums
from fastkernels.ops.rope import rope, rope_append_kv
from fastkernels.ops.sampling import IN_PROMPT, count_tokens, penalize, sample, top_logprobs
from fastkernels.ops.token_linear import token_linear, token_weight_only_linear
from fastkernels.ops.weight_only import (
    PACKED_FORMATS,
    WEIGHT_ONLY_FEW_TACTICS,
    WEIGHT_ONLY_TACTICS,
    WEIGHT_ONLY_TILES,
    RepackedWeight,
    repack_for_cuda,
    weight_only_linear,
)

__all__ = [
    "IN_PROMPT",
    "LINEAR_MAX_TOKENS",
    "PACKED_FORMATS",
    "WEIGHT_ONLY_FEW_TACTICS",
    "WEIGHT_ONLY_TACTICS",
    "WEIGHT_ONLY_TILES",
    "AttentionPlan",
    "RepackedWeight",
    "add_rms_norm",
    "add_rms_norm_quant",
    "append_kv",
    "attention",
    "attention_plan_sizes",
    "copy_pages",
    "count_tokens",
    "embedding",
    "gather_rows",
    "gelu_mul",
    "gelu_mul_quant",
    "interleave_rows",
    "interleaves",
    "layer_norm",
    "linear",
    "linear_silu_mul",
    "paged_attention",
    "penalize",
    "plan_attention",
    "quantize",
    "quantize_zeros",
    "quantized_linear",
    "repack_for_cuda",
    "resolve_token_ids",
    "rms_norm",
    "rms_norm_quant",
    "rope",
    "rope_append_kv",
    "row_sums",
    "sample",
    "silu_mul",
    "silu_mul_quant",
    "token_linear",
    "token_weight_only_linear",
    "top_logprobs",
    "weight_only_linear",
]
