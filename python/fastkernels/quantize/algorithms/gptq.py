"""GPTQ: round a column, and let the columns that are not rounded yet make up for its error.

With H the mean of x x^T, the error of a row is (w - q) H (w - q)^T. Rounding column i to q_i and moving the
columns behind it by -(w_i - q_i) / U_ii * U_i,: keeps it least, where U is the upper Cholesky factor of H^-1.
Columns go in order of falling H_ii (activation order), with the scales chosen before, so that groups stay
where they are and no index has to be stored; they go in blocks, and what a block owes the columns behind it
is one product.
Source: Frantar, Ashkboos, Hoefler and Alistarh 2022, GPTQ, sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkernels.quantize.algorithms.grid import Grid
from fastkernels.quantize.scheme import QuantizationError

DAMPING = 0.01
BLOCK = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
    activation_order: bool = True,
) -> Tensor:
    """weight fp32 [out_size, in_size] -> fp32 of the same shape, on the grid.

    hessian: fp32 [in_size, in_size]; columns that were never read, whose diagonal is 0, are rounded as they
             are
    damping: of the diagonal's mean, added to it; more where it is still not positive definite
    """
    in_size = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True) if activation_order else torch.arange(in_size).to(weight.device)
    upper = _inverse_factor(hessian[order][:, order], damping)
    left = weight[:, order]
    rounded = torch.empty_like(left)
    for begin in range(0, in_size, block):
        end = min(begin + block, in_size)
        part, factor = left[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.empty_like(part)
        for i in range(end - begin):
            column = part[:, i : i + 1]
            value = grid.round(column, order[begin + i : begin + i + 1])
            errors[:, i : i + 1] = (column - value) / factor[i, i]
            rounded[:, begin + i : begin + i + 1] = value
            part[:, i + 1 :] -= errors[:, i : i + 1] * factor[i, i + 1 :]
        left[:, end:] -= errors @ upper[begin:end, end:]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the matrix, damped until it has one."""
    if not torch.isfinite(hessian.diagonal()).all():
        raise QuantizationError("its inputs hold NaN or infinity on the calibration text")
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    diagonal[diagonal == 0] = mean
    while True:
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed.item():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.item():
                return upper
        damping *= 10
