"""Loads the C++ library: torch first, since the ops register themselves with it."""

import torch  # noqa: F401

try:
    from fastkernels import _C
except ImportError as error:  # pragma: no cover - a broken installation
    raise ImportError(
        "the C++ library of fastkernels is missing or does not fit this torch; build it with 'pip install .' "
        f"or 'make build' ({error})"
    ) from error

__all__ = ["_C"]
