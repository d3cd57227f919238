"""The exceptions of the engine; each message is one sentence that says what is taken.

Beside these: ``config.ConfigError`` with its ``UnsupportedModelError``, ``checkpoint.CheckpointError`` and
``ChatTemplateError`` for what is read from a checkpoint, and ``compiler.EngineMemoryError``, whose message
does the arithmetic of what does not fit.
"""

from __future__ import annotations


class SamplingError(ValueError):
    """A sampling parameter outside its range."""


class RequestError(ValueError):
    """A prompt that cannot be served: empty, longer than the context, or with token ids the model does not
    have.
    """


class ModelNotFoundError(ValueError):
    """A model that is neither a folder, nor the demo, nor the name of a preset."""


class DeviceError(ValueError):
    """A device that is not there, or that this build has no kernels for."""


class EngineClosedError(RuntimeError):
    """The engine was closed, or a step failed and its state is lost."""
