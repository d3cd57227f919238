"""Scales of a KV cache of 8 bits from the keys and values that passed."""

import pytest
import torch

from fastkernels.quantize.kv_scales import HEADROOM, KVObserver, RoundedKV
from fastkernels.quantize.ranges import ESTIMATORS

LARGEST = {"fp8": 448.0, "int8": 127.0}


def observed(device: torch.device) -> tuple[KVObserver, dict[str, torch.Tensor]]:
    """Three batches [2, 4, 300, 64] of keys with a few loud dimensions, more than an observer keeps."""
    seen: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
    observer = KVObserver()
    loud = torch.ones(64).index_fill(0, torch.tensor([3, 40]), 9.0)
    for _ in range(3):
        for which, by in (("k", loud), ("v", torch.ones(64))):
            x = (torch.randn(2, 4, 300, 64) * by).to(device)
            assert observer(which, x) is x
            seen[which].append(x)
    return observer, {which: torch.stack(pieces) for which, pieces in seen.items()}


@pytest.mark.parametrize("cache", HEADROOM)
def test_the_largest_has_room_above_it(cache, device):
    observer, seen = observed(device)
    for which, scale in observer.scales(cache, "min-max").items():
        assert scale.shape == (1,) and scale.dtype == torch.float32
        largest = seen[which].abs().amax()
        if which == "k":
            largest = max(largest, (seen["k"] - observer.key_offset()[:, None]).abs().amax())
        expected = largest * HEADROOM[cache] / LARGEST[cache]
        torch.testing.assert_close(scale[0], expected)


def test_keys_without_their_mean(device):
    """Rounded so, keys that have one lose less; the rounding error of a mean is none of the scores'."""
    torch.manual_seed(3)
    observer, mean = KVObserver(), (torch.randn(4, 64) * 8).to(device)
    x = torch.randn(6, 4, 500, 64, device=device) + mean[:, None]
    for part in x.split(2):
        observer("k", part)
        observer("v", part)
    offset = observer.key_offset()
    assert offset.shape == (4, 64) and offset.dtype == torch.float32
    torch.testing.assert_close(offset, x.double().mean((0, 2)).float())
    scales = observer.scales("fp8")
    plain, less = (RoundedKV(scales, "fp8", one)("k", x) - x for one in (None, offset))
    assert less.square().mean() < 0.2 * plain.square().mean()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("cache", HEADROOM)
def test_ranges(cache, estimator, device):
    """Every range lies within the values' own, and rounds them well enough."""
    observer, seen = observed(device)
    widest, found = observer.scales(cache, "min-max"), observer.scales(cache, estimator)
    rounding = RoundedKV(found, cache)
    for which, scale in found.items():
        assert 0.2 * widest[which] <= scale <= widest[which] * (1 + 1e-6)
        error = (rounding(which, seen[which]) - seen[which]).norm() / seen[which].norm()
        assert error < 0.08


def test_the_range_is_the_largest_unless_it_is_said(device):
    observer, seen = observed(device)
    for cache in HEADROOM:
        assert observer.scales(cache) == observer.scales(cache, "min-max")
    least, widest = observer.scales("int8", "mse"), observer.scales("int8", "min-max")
    errors = [
        (RoundedKV(scales, "int8")("k", seen["k"]) - seen["k"]).square().sum() for scales in (least, widest)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-3)
