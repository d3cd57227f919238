"""Fixtures every test may use: `device` runs a test on the CPU and, where there is a GPU, on it."""

import pytest
import torch

import fastkernels


def _cuda_reason() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU on this machine"
    if not fastkernels._C.with_cuda:
        return "fastkernels was built without CUDA kernels"
    return None


CUDA_REASON = _cuda_reason()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
