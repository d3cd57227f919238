"""Every tolerance of the tests, in one place."""

import torch

# The absolute term beside "at most twice as far from the float64 reference as plain torch in this dtype is":
# about one unit in the last place of a value of size 1.
ABSOLUTE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_good_as_torch(
    result: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """result: the kernel's; plain: torch's in the same dtype; exact: in float64; all on the same inputs."""
    dtype = dtype or result.dtype
    assert result.shape == exact.shape
    assert torch.isfinite(result).all() or not torch.isfinite(exact).all(), "an element was not written"
    if result.numel() == 0:
        return
    error = (result.double().cpu() - exact.double().cpu()).abs().max().item()
    torch_error = (plain.double().cpu() - exact.double().cpu()).abs().max().item()
    scale = max(1.0, exact.double().abs().max().item())
    limit = 2 * torch_error + ABSOLUTE[dtype] * scale
    assert error <= limit, (
        f"max abs error {error:.3g}, torch's in {dtype} is {torch_error:.3g}, limit {limit:.3g}"
    )


def assert_similar(result: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    """1 - 2 sum(xy) / sum(x^2 + y^2) is below limit, the bound of matrix products."""
    x, y = result.double(), exact.double()
    total = (x * x + y * y).sum()
    difference = (((x - y) ** 2).sum() / total).item() if total > 0 else 0.0
    assert difference < limit, f"the result is {difference:.3g} unlike the reference, the limit {limit}"


def assert_rounded(result: torch.Tensor, exact: torch.Tensor, slack: float) -> None:
    """result: e4m3 or int8; exact: what is rounded to it and saturated. Off by half a step at most, and by
    slack of the largest value, of which sums are that much off before they are rounded."""
    is_int8 = result.dtype == torch.int8
    values = exact.clamp(-128, 127) if is_int8 else exact.clamp(-448, 448)
    half_step = 0.5 if is_int8 else torch.exp2(values.abs().log2().floor().clamp_min(-6)) / 16
    over = ((result.double() - values).abs() - half_step).max() / values.abs().max()
    assert over <= slack, f"{over:.3g} of the largest value beyond half a step, the limit {slack}"


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An output filled with NaN (or the type's lowest value), so that an element left unwritten shows."""
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, value, dtype=dtype, device=device)
