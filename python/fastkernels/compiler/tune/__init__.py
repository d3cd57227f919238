"""The autotuner: products, their tactics, what a GPU takes for each, and the file that remembers."""

from fastkernels.compiler.tune.cache import FILE_NAME, TacticCache, Timed
from fastkernels.compiler.tune.calls import Call, call_of
from fastkernels.compiler.tune.tactics import (
    BUCKETS,
    HOPPER,
    PRODUCT_STEPS,
    STREAM,
    TORCH,
    Product,
    Tactic,
    bucket_of,
    gates,
    matmul_runs_on,
    product_of,
    products_of,
    rule,
    tactics_of,
)
from fastkernels.compiler.tune.tuner import BY_RULE, Choices, Timer, tune

__all__ = [
    "BUCKETS",
    "BY_RULE",
    "FILE_NAME",
    "HOPPER",
    "PRODUCT_STEPS",
    "STREAM",
    "TORCH",
    "Call",
    "Choices",
    "Product",
    "Tactic",
    "TacticCache",
    "Timed",
    "Timer",
    "bucket_of",
    "call_of",
    "gates",
    "matmul_runs_on",
    "product_of",
    "products_of",
    "rule",
    "tactics_of",
    "tune",
]
