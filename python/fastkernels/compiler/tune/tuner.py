"""Which tactic each product takes for each bucket of tokens: by the cache, by timing, or by the rule.

FASTKERNELS_TUNE says how an engine is made:
    off      by the rule; the cache is not looked at
    cached   by the cache where it has the product and bucket, else by the rule; nothing is timed (default)
    full     as cached, but what is missing is timed first, and kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastkernels.compiler.tune.cache import TacticCache, Timed
from fastkernels.compiler.tune.tactics import (
    Product,
    Tactic,
    bucket_of,
    buckets_up_to,
    rule,
    tactics_of,
)
from fastkernels.config import TuneMode

# Of the rule's time a tactic may take at most so much to replace it. Alone is not in the chain: one that was
# 6% faster by itself made Llama-3.1-8B's step 1% slower (gate_up, 128 tokens), one of 2% made it 6% slower
# (gate_up, 8 tokens).
MOST_OF_RULE = 0.9

Timer = Callable[[Product, int, Tactic], float]
"""Microseconds of a product of so many tokens by a tactic."""


@dataclass(frozen=True)
class Choices:
    """What an engine takes; fixed when it is made.

    num_timed:  how many times were taken for it
    capability: of the GPU that it is for, by which the rule goes
    """

    timed: Mapping[tuple[Product, int], Timed] = field(default_factory=dict)
    num_timed: int = 0
    capability: tuple[int, int] | None = None

    def tactic(self, product: Product, num_tokens: int) -> Tactic:
        found = self.timed.get((product, bucket_of(num_tokens)))
        return rule(product, num_tokens, self.capability) if found is None else found.tactic


BY_RULE = Choices()


def tune(
    products: Mapping[Product, int],
    cache: TacticCache,
    timer: Timer,
    *,
    mode: TuneMode,
    capability: tuple[int, int],
    again: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Choices:
    """The choice of each product, for as many buckets as its rows in ``products`` take.

    timer:    asked only in mode "full"
    again:    what the cache has is timed anew
    progress: called with the times taken and those to take
    A product or bucket with one tactic is neither timed nor kept. The fastest tactic wins, the first of
    equally fast ones, but the rule's where no other is clearly faster (MOST_OF_RULE).
    What the cache has is taken if it is still one of the tactics.
    """
    if mode == "off":
        return Choices(capability=capability)
    kept = cache.read()
    timed: dict[tuple[Product, int], Timed] = {}
    missing: dict[Product, dict[int, list[Tactic]]] = {}
    for product, rows in products.items():
        for bucket in reversed(buckets_up_to(rows)):  # the largest first: the timer cuts the others from it
            tactics = tactics_of(product, bucket, capability)
            found = kept.get(str(product), {}).get(bucket)
            if found is not None and found.tactic in tactics and not again:
                timed[product, bucket] = found
            elif mode == "full" and len(tactics) > 1:
                missing.setdefault(product, {})[bucket] = tactics
    total = sum(len(tactics) for buckets in missing.values() for tactics in buckets.values())
    done = 0
    for product, buckets in missing.items():
        new: dict[int, Timed] = {}
        for bucket, tactics in buckets.items():
            times = {}
            for tactic in tactics:
                times[tactic] = timer(product, bucket, tactic)
                done += 1
                if progress is not None:
                    progress(done, total)
            best, plain = min(times, key=times.__getitem__), rule(product, bucket, capability)
            if times[best] > MOST_OF_RULE * times[plain]:
                best = plain
            new[bucket] = Timed(best, times)
        cache.store(str(product), new)
        timed |= {(product, bucket): one for bucket, one in new.items()}
    return Choices(timed, done, capability)
