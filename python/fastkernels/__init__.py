"""fastkernels: an inference compiler and runtime for large language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastkernels import errors, ops
from fastkernels._library import _C
from fastkernels.config import SamplingParams

if TYPE_CHECKING:
    from fastkernels import quantize
    from fastkernels.llm import LLM, RequestOutput, TextPiece
    from fastkernels.quantize.run import quantize_checkpoint

__version__: str = _C.version

__all__ = [
    "LLM",
    "RequestOutput",
    "SamplingParams",
    "TextPiece",
    "__version__",
    "errors",
    "ops",
    "quantize",
    "quantize_checkpoint",
    "register_with_transformers",
]

_LAZY = {
    **dict.fromkeys(("LLM", "RequestOutput", "TextPiece"), "fastkernels.llm"),
    "quantize_checkpoint": "fastkernels.quantize.run",
}


def __getattr__(name: str) -> Any:
    """The engine is imported when it is first asked for, so that the ops alone stay light."""
    if name == "quantize":
        return importlib.import_module("fastkernels.quantize")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastkernels' has no attribute {name!r}")


def register_with_transformers() -> None:
    """Make attn_implementation="fastkernels" known to transformers, which this imports.

    What it takes: ``fastkernels.integrations.transformers``. Raises ImportError without transformers.
    """
    importlib.import_module("fastkernels.integrations.transformers").register()
