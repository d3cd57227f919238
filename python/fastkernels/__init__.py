"""fastkernels: an inference compiler and runtime for large language models."""

from fastkernels import ops
from fastkernels._library import _C

__version__: str = _C.version

__all__ = ["__version__", "ops"]
