"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, and the tensor or key, expected and found."""
