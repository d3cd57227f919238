"""Quantised products of every kind at the smallest sizes they take, few and many tokens, and at the largest.

On a GPU ``quantized_linear`` takes the kernel that the rule chooses; every tactic: test_matmul_sm90.py,
test_matmul_sm80.py, test_weight_only.py.
"""

from typing import Any

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.conftest import CUDA_REASON
from tests.ops.test_quantized_linear import SCHEMES, operands
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

on_cuda = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))

TOKENS = [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000]
# scheme -> the smallest in_size on the CPU and on a GPU
SMALLEST = {
    "int8-weight": (1, 8),
    "int8": (1, 16),
    "int8-zeros": (1, 16),
    "int4-channel": (2, 8),
    "int4-channel-zeros": (2, 8),
    "int4-g32-zeros": (32, 32),
    "int4-g64": (64, 64),
    "int4-g128": (128, 128),
    "nvfp4": (16, 16),
    "mxfp4": (32, 32),
    "fp8": (1, 16),
    "fp8-e5m2": (1, 16),
    "fp8-weight": (1, 8),
    "fp8-block": (128, 128),
}


def smallest(scheme: str, device: torch.device) -> tuple[int, int]:
    """out_size, in_size."""
    if device.type == "cpu":
        return 1, SMALLEST[scheme][0]
    return 8 if SCHEMES[scheme][5] else 1, SMALLEST[scheme][1]


def on(device: torch.device, given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("scheme", SMALLEST)
def test_the_smallest_sizes(scheme, device):
    out_size, in_size = smallest(scheme, device)
    for times in (1, 3):
        for num_tokens in TOKENS:
            given = operands(scheme, num_tokens, times * out_size, times * in_size, torch.bfloat16)
            moved = on(device, given)
            out = poisoned(num_tokens, times * out_size, dtype=torch.bfloat16, device=device)
            assert ops.quantized_linear(**moved, out=out) is out
            exact = reference.quantized_linear(**given)
            assert_as_good_as_torch(out, reference.quantized_linear(**given, dtype=torch.bfloat16), exact)
            assert_similar(out.cpu(), exact, 1e-5)
            assert torch.equal(out, ops.quantized_linear(**moved)), "two runs differ"


@pytest.mark.skipif(
    CUDA_REASON is not None or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_smallest_sizes_of_16_bits(dtype):
    for size in (8, 24):
        for num_tokens in TOKENS:
            x = torch.randn(num_tokens, size, dtype=dtype, device="cuda")
            weight = torch.randn(size, size, dtype=dtype, device="cuda")
            out = poisoned(num_tokens, size, dtype=dtype, device="cuda")
            assert ops.linear(x, weight, tactic=-1, out=out) is out
            exact = reference.linear(x.double(), weight.double())
            assert_as_good_as_torch(out, reference.linear(x, weight), exact)
            assert_similar(out, exact, 1e-5)
            assert torch.equal(out, ops.linear(x, weight, tactic=-1)), "two runs differ"


@on_cuda
@pytest.mark.parametrize("scheme", ["fp8", "int8", "int8-zeros", "int8-weight", "int4-channel", "fp8-weight"])
def test_below_the_smallest_one_sentence_says_so(scheme):
    in_size = SMALLEST[scheme][1] // 2
    given = on(torch.device("cuda"), operands(scheme, 3, 8, in_size, torch.bfloat16))
    with pytest.raises((ValueError, RuntimeError), match=r"multiples? of (8|16)") as caught:
        ops.quantized_linear(**given)
    assert "\n" not in str(caught.value).strip()


# --- more than 2^31 elements ------------------------------------------------------------------------------


@on_cuda
@pytest.mark.parametrize("tactic, num_tokens", [(1, 3), (0, 3), (0, 40)])
def test_a_packed_weight_of_more_than_2_31_elements(tactic, num_tokens):
    out_size, in_size = (1 << 31) // 16384 + 130, 16384
    device = torch.device("cuda")
    weight = torch.randint(0, 256, (out_size, in_size // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(out_size, in_size // 128, device=device) + 0.5).bfloat16() / 512
    x = torch.randn(num_tokens, in_size, device=device, dtype=torch.bfloat16)
    options: dict[str, Any] = {"weight_type": "int4", "block": (1, 128)}
    out = poisoned(num_tokens, out_size, dtype=torch.bfloat16, device=device)
    ops.weight_only_linear(x, ops.repack_for_cuda(weight, scales, **options), tactic=tactic, out=out)
    assert torch.isfinite(out).all()
    for rows in (slice(0, 40), slice((1 << 31) // in_size - 20, (1 << 31) // in_size + 20), slice(-40, None)):
        exact = reference.quantized_linear(x, weight[rows], scales[rows], **options)
        assert_similar(out[:, rows], exact, 1e-5)


@on_cuda
def test_a_weight_only_result_of_more_than_2_31_elements():
    num_tokens, out_size = 80_000, 27_136
    given = on(torch.device("cuda"), operands("int4-g128", 1, out_size, 128, torch.bfloat16))
    x = torch.randn(num_tokens, 128, device="cuda", dtype=torch.bfloat16)
    out = poisoned(num_tokens, out_size, dtype=torch.bfloat16, device="cuda")
    ops.quantized_linear(**{**given, "x": x, "bias": None}, out=out)
    for rows in (slice(0, 200), slice(79_134, 79_150), slice(num_tokens - 200, num_tokens)):
        exact = reference.quantized_linear(**{**given, "x": x[rows], "bias": None})
        assert_similar(out[rows], exact, 1e-5)
    assert torch.isfinite(out[::997]).all()
