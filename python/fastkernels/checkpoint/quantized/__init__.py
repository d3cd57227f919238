"""Quantised checkpoints: readers of what other tools wrote, and a writer of compressed-tensors."""

from fastkernels.checkpoint.quantized.writer import QuantizedWriter

__all__ = ["QuantizedWriter"]
