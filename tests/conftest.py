"""Fixtures every test may use: `device` runs a test on the CPU and, where there is a GPU, on it."""

from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on more threads, on a machine that does other things many times so."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says why the CUDA half was skipped, once."""
    if CUDA_REASON is not None and "skipped" in terminalreporter.stats:
        terminalreporter.write_line(f"CUDA tests were skipped: {CUDA_REASON}")
