"""Quantised checkpoints: readers of what other tools wrote, and a writer of compressed-tensors.

``Checkpoint.quantized`` is what they read; a format is a file.
"""

from fastkernels.checkpoint.quantized.formats import QuantizedWeights, open_quantized, quantization_config
from fastkernels.checkpoint.quantized.kv_cache import KVKind, StoredKV, is_kv_scale, open_kv
from fastkernels.checkpoint.quantized.stored import StoredLinear
from fastkernels.checkpoint.quantized.writer import QuantizedWriter

__all__ = [
    "KVKind",
    "QuantizedWeights",
    "QuantizedWriter",
    "StoredKV",
    "StoredLinear",
    "is_kv_scale",
    "open_kv",
    "open_quantized",
    "quantization_config",
]
