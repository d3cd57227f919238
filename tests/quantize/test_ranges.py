"""Range estimators against what they are by definition."""

import pytest
import torch

from fastkernels.quantize import QuantizationError
from fastkernels.quantize.ranges import ESTIMATORS, estimate_range, scale_of


@pytest.fixture
def values(device: torch.device) -> torch.Tensor:
    """Normal, with a few far out; the second row leans to one side."""
    rows = torch.randn(3, 20000)
    rows[0, 7], rows[1, 3] = 40.0, -25.0
    rows[1] = rows[1].clamp(-25, 1)
    return rows.to(device)


def test_min_max(values):
    low, high = estimate_range(values)
    torch.testing.assert_close(high, values.abs().amax(1))
    torch.testing.assert_close(low, -high)
    low, high = estimate_range(values, symmetric=False)
    torch.testing.assert_close(torch.stack([low, high]), torch.stack([values.amin(1), values.amax(1)]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_leaves_its_share_outside(values, symmetric):
    low, high = estimate_range(values, "percentile", symmetric=symmetric)
    outside = ((values < low[:, None]) | (values > high[:, None])).sum(1)
    assert (outside <= 2).all() and outside[0] >= 1
    assert high[0] < 10


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_best_of_many(values, symmetric):
    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if symmetric:
            step = scale_of(high, "int8")[:, None]
            return ((values / step).round().clamp(-127, 127) * step - values).square().sum(1)
        step = ((high - low) / 255)[:, None]
        zero = (-low[:, None] / step).round()
        return (((values / step + zero).round().clamp(0, 255) - zero) * step - values).square().sum(1)

    low, high = estimate_range(values, "mse", symmetric=symmetric)
    whole = estimate_range(values, symmetric=symmetric)
    for share in (1.0, 0.9, 0.7, 0.5, 0.3):
        assert (error(low, high) <= error(whole[0] * share, whole[1] * share) * 1.01).all()


def test_entropy_cuts_outliers_and_keeps_what_has_none(device):
    rows = torch.stack([torch.randn(50000), torch.rand(50000) * 2 - 1])
    rows[0, 0] = 60.0
    _, high = estimate_range(rows.to(device), "entropy")
    assert 2.5 < high[0] < 12
    assert high[1] > 0.95
    _, high = estimate_range(torch.zeros(1, 10, device=device), "entropy")
    assert high.item() == 0 and scale_of(high, "int8").item() == 1


def test_e4m3(values):
    """The range of least squared error after rounding: no share of the whole range does better."""

    def error(high: torch.Tensor) -> torch.Tensor:
        scale = (high / 448)[:, None]
        return (
            ((values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale - values)
            .square()
            .sum(1)
        )

    _, high = estimate_range(values, "mse", weight_type="e4m3")
    for share in (1.0, 0.9, 0.7, 0.5, 0.3):
        assert (error(high) <= error(values.abs().amax(1) * share) * 1.01).all()


def test_what_is_refused():
    assert set(ESTIMATORS) == {"min-max", "percentile", "mse", "entropy"}
    with pytest.raises(QuantizationError, match="no range estimator is called 'median'; there are min-max"):
        estimate_range(torch.randn(1, 5), "median")  # type: ignore[arg-type]
    for bad in (torch.empty(1, 0), torch.tensor([[float("nan")]]), torch.randn(3)):
        with pytest.raises(QuantizationError, match=r"a range takes finite values \[rows, count\]"):
            estimate_range(bad)
