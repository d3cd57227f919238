"""What calibration keeps of a linear's inputs, however much text goes by."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE_ROWS = 512


class InputStatistics:
    """Of inputs [num_tokens, in_size], piece by piece.

    hessian: fp32 [in_size, in_size], the mean of x x^T; what GPTQ and AWQ measure errors with
    largest: fp32 [in_size], the largest magnitude of every column
    mean_magnitude: fp32 [in_size]
    sample:  fp32, at most 512 rows spread over all pieces
    """

    def __init__(
        self, in_size: int, num_tokens: int, device: torch.device, *, with_hessian: bool = True
    ) -> None:
        """num_tokens: how many will come. with_hessian: it is most of the work and of the memory."""
        self._every = max(-(-num_tokens // _SAMPLE_ROWS), 1)
        self._products = torch.zeros(in_size, in_size, device=device) if with_hessian else None
        self._magnitudes = torch.zeros(in_size, device=device)
        self._sample: list[Tensor] = []
        self.largest = torch.zeros(in_size, device=device)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.float()
        if self._products is not None:
            self._products.addmm_(x.T, x)
        magnitudes = x.abs()
        self._magnitudes += magnitudes.sum(0)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        first = -self.num_tokens % self._every
        self._sample.append(x[first :: self._every].clone())
        self.num_tokens += len(x)

    @property
    def hessian(self) -> Tensor:
        assert self._products is not None
        return self._products / self.num_tokens

    @property
    def mean_magnitude(self) -> Tensor:
        return self._magnitudes / self.num_tokens

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._sample)
