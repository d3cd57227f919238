"""C++ host objects of fastkernels."""

with_cuda: bool
version: str

def cpu_isa() -> str: ...
