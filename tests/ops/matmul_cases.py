"""Operands of matmul's kernels, and what their products are exactly."""

import torch

from fastkernels import ops
from fastkernels.ops import reference
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

# scheme -> weight_type, rows of a block (0: all), its size (0: all), activation
SCHEMES = {
    "fp8": ("e4m3", 1, 0, "e4m3"),
    "fp8-one-scale": ("e4m3", 0, 0, "e4m3"),
    "fp8-block": ("e4m3", 128, 128, "e4m3-block"),
    "fp8-e5m2": ("e4m3", 1, 0, "e5m2"),
    "int8": ("int8", 1, 0, "int8"),
    "int8-zeros": ("int8", 1, 0, "int8-zeros"),
}


def operands(num_tokens, out_size, in_size, dtype):
    x = torch.randn(num_tokens, in_size, device="cuda", dtype=dtype)
    weight = torch.randn(out_size, in_size, device="cuda", dtype=dtype) * in_size**-0.5
    return x, weight, torch.randn(out_size, device="cuda", dtype=dtype)


def quantized_operands(scheme, num_tokens, out_size, in_size, dtype):
    weight_type, rows, size, activation = SCHEMES[scheme]
    rows, size = rows or out_size, size or in_size
    if weight_type == "int8":
        weight, spread = torch.randint(-128, 128, (out_size, in_size), device="cuda").to(torch.int8), 74.0
    else:
        weight, spread = torch.randn(out_size, in_size, device="cuda").mul(20).to(torch.float8_e4m3fn), 20.0
    scales = torch.rand(-(-out_size // rows), -(-in_size // size), device="cuda").add(0.5) / (
        spread * in_size**0.5
    )
    x = torch.randn(num_tokens, in_size, device="cuda", dtype=dtype)
    return {
        "x": x.exp() if activation == "int8-zeros" else x,  # zero points pay where 0 is not in the middle
        "weight": weight,
        "scales": scales,
        "bias": torch.randn(out_size, device="cuda", dtype=dtype),
        "weight_type": weight_type,
        "block": (rows, size),
        "activation": activation,
    }


def exact_quantized(given, dtype=torch.float64):
    """In float64 (or dtype) from the bytes that the product is of, which are those of the CPU."""
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    return reference.quantized_linear(**on_cpu, dtype=dtype).cuda()


def check_quantized(scheme, num_tokens, out_size, in_size, dtype, *, tactic, workspace, is_exact=True):
    """quantized_linear by a tactic, with and without bias by the number of tokens; blocks want whole ones.

    is_exact: sums are of fp32; without, of about 14 bits
    """
    in_size = -(-in_size // 128) * 128 if scheme == "fp8-block" else in_size
    given = quantized_operands(scheme, num_tokens, out_size, in_size, dtype)
    if num_tokens % 4 > 1:
        given["bias"] = None
    out = poisoned(num_tokens, out_size, dtype=dtype, device="cuda")
    assert ops.quantized_linear(**given, tactic=tactic, workspace=workspace, out=out) is out
    exact = exact_quantized(given)
    if is_exact:
        assert_as_good_as_torch(out, exact_quantized(given, dtype), exact)
    assert torch.isfinite(out).all()
    assert_similar(out, exact, 1e-5 if is_exact else 1e-3)
    again = ops.quantized_linear(**given, constant_weight=True, tactic=tactic, workspace=workspace)
    assert torch.equal(out, again), "two runs differ"
