"""Fixtures every test may use: `device` runs a test on the CPU and, where there is a GPU, on it."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

import fastkernels
from fastkernels.ops import reference

os.environ.setdefault("FASTKERNELS_TUNE", "off")  # what was tuned on this machine is no part of a test


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


def _on_the_cpu(oracle: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: object, **options: object) -> torch.Tensor:
        device = next(x.device for x in (*args, *options.values()) if isinstance(x, torch.Tensor))
        moved = [x.cpu() if isinstance(x, torch.Tensor) else x for x in args]
        named = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        return oracle(*moved, **named).to(device)

    return call


if os.environ.get("FASTKERNELS_REFERENCE_ON_CPU"):  # compute-sanitizer's racecheck breaks cuBLAS's kernels
    for _name in ("attention", "paged_attention", "linear", "linear_silu_mul", "quantized_linear"):
        setattr(reference, _name, _on_the_cpu(getattr(reference, _name)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every n-th test alone: compute-sanitizer takes minutes for a file of them (tools/gpu_check.sh)."""
    n = int(os.environ.get("FASTKERNELS_EVERY_NTH_TEST", "1"))
    if n > 1:
        selected = [item for item in items if "cpu" not in item.name][::n]
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = selected


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
