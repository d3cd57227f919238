"""The next token from logits: penalties, temperature, top-k, top-p, min-p, the draw, and log-probabilities.

Parameters are read on the device by the kernels, so nothing here looks at their values: each op says what it
does with the ones outside their range. fastkernels.SamplingParams is where they are validated.
"""

from __future__ import annotations

import torch

from fastkernels.ops.checks import (
    FLOAT_DTYPES,
    as_tensor,
    check_device,
    check_dtype,
    check_last_contiguous,
    check_shape,
    register_mutating_fake,
    require,
)

MAX_VOCAB_SIZE = 1 << 22
# In an element of token_counts: "occurs in the prompt"; the bits below count the occurrences in the output.
IN_PROMPT = 1 << 30

register_mutating_fake("sample", "penalize", "count_tokens")


def _check_logits(op: str, logits: torch.Tensor) -> None:
    check_shape(op, "logits", logits, (None, None), "[num_seqs, vocab_size]")
    check_dtype(op, "logits", logits, FLOAT_DTYPES)
    check_last_contiguous(op, logits=logits)


def _check_rows(op: str, size: int, **vectors: tuple[torch.Tensor, torch.dtype]) -> None:
    """Contiguous vectors with one element a row."""
    for name, (x, dtype) in vectors.items():
        check_dtype(op, name, x, (dtype,))
        check_shape(op, name, x, (size,), f"[num_seqs], here [{size}]")
        check_last_contiguous(op, **{name: x})


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    *,
    out_ids: torch.Tensor | None = None,
    out_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token id from each row of logits, after temperature, top-k, top-p and min-p, in that order.

    logits:      [num_seqs, vocab_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride;
                 vocab_size 1 to 2^22
    temperature: [num_seqs] fp32; 0 and less: greedy, the largest logit, of equal ones the lowest id
    top_k:       [num_seqs] int32; exactly the k largest stay, of equal ones the lowest ids; below 1: off
    top_p:       [num_seqs] fp32; the fewest largest stay whose probability, among what top-k left, reaches
                 top_p, of equal ones the lowest ids; 1 and more: off; 0 and less: one stays
    min_p:       [num_seqs] fp32; those stay whose probability is at least min_p times the largest; 0 and
                 less: off; above 1: as 1
    seeds:       [num_seqs] int64, the key of the random numbers
    steps:       [num_seqs] int32, their counter: the index of this token in its sequence
    out_ids:     [num_seqs] int32; allocated when None
    out_logprobs: [num_seqs] fp32, the id's log-softmax at temperature 1, unfiltered; allocated when None
    Returns (out_ids, out_logprobs).
    A row's result depends on its logits and parameters alone, not on its place or on the batch; it is bitwise
    repeatable, and the CPU and the GPU choose the same id. A NaN parameter is as "off" (temperature: greedy).
    A NaN logit counts as -inf; a row of nothing else gives id 0 with log-probability -inf. Tokens less likely
    than 2^-41 of the likeliest are never drawn. Safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Sources: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), Salmon et al. 2011 (Philox).
    Kernels: csrc/sampling/sample.cu, sample.cpp
    """
    logits, temperature, top_k, top_p = (
        as_tensor(logits),
        as_tensor(temperature),
        as_tensor(top_k),
        as_tensor(top_p),
    )
    min_p, seeds, steps = as_tensor(min_p), as_tensor(seeds), as_tensor(steps)
    _check_logits("sample", logits)
    num_seqs, vocab_size = logits.shape
    require(
        1 <= vocab_size <= MAX_VOCAB_SIZE,
        f"sample: vocab_size is {vocab_size}, but the op takes 1 to {MAX_VOCAB_SIZE}",
    )
    if out_ids is None:
        out_ids = torch.empty(num_seqs, dtype=torch.int32, device=logits.device)
    if out_logprobs is None:
        out_logprobs = torch.empty(num_seqs, dtype=torch.float32, device=logits.device)
    _check_rows(
        "sample",
        num_seqs,
        temperature=(temperature, torch.float32),
        top_k=(top_k, torch.int32),
        top_p=(top_p, torch.float32),
        min_p=(min_p, torch.float32),
        seeds=(seeds, torch.int64),
        steps=(steps, torch.int32),
        out_ids=(out_ids, torch.int32),
        out_logprobs=(out_logprobs, torch.float32),
    )
    check_device(
        "sample",
        logits=logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        out_ids=out_ids,
        out_logprobs=out_logprobs,
    )
    torch.ops.fastkernels.sample(
        logits, temperature, top_k, top_p, min_p, seeds, steps, out_ids, out_logprobs
    )
    return out_ids, out_logprobs


def penalize(
    logits: torch.Tensor,
    token_counts: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Lower, in place, the logits of tokens that have occurred.

    occurred in prompt or output: logit / repetition where it is above 0, logit * repetition elsewhere; then
    occurred count times in output: logit - presence - frequency * count

    logits:       [num_seqs, vocab_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride
    token_counts: [num_slots, vocab_size] int32 contiguous; bit 30 (IN_PROMPT): occurs in the prompt; the bits
                  below: occurrences in the output
    slots:        [num_seqs] int32, the row of token_counts; outside [0, num_slots): the row is left alone
    repetition:   [num_seqs] fp32; 1: off
    presence, frequency: [num_seqs] fp32; 0: off
    Returns logits. Computes in fp32; bitwise repeatable; safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Sources: Keskar et al. 2019 (repetition); the OpenAI API reference (presence, frequency).
    Kernels: csrc/sampling/penalize.cu, penalize.cpp
    """
    logits, token_counts, slots = as_tensor(logits), as_tensor(token_counts), as_tensor(slots)
    repetition, presence, frequency = as_tensor(repetition), as_tensor(presence), as_tensor(frequency)
    _check_logits("penalize", logits)
    num_seqs, vocab_size = logits.shape
    _check_token_counts("penalize", token_counts, vocab_size)
    _check_rows(
        "penalize",
        num_seqs,
        slots=(slots, torch.int32),
        repetition=(repetition, torch.float32),
        presence=(presence, torch.float32),
        frequency=(frequency, torch.float32),
    )
    check_device(
        "penalize",
        logits=logits,
        token_counts=token_counts,
        slots=slots,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
    )
    torch.ops.fastkernels.penalize(logits, token_counts, slots, repetition, presence, frequency)
    return logits


def count_tokens(token_ids: torch.Tensor, slots: torch.Tensor, token_counts: torch.Tensor) -> torch.Tensor:
    """Add one, in place, to the output count of each row's token.

    token_ids:    [num_seqs] int32; an id outside the vocabulary is not counted
    slots:        [num_seqs] int32, the row of token_counts; outside [0, num_slots), -1 say: not counted
    token_counts: [num_slots, vocab_size] int32 contiguous, as penalize takes it
    Returns token_counts. Safe in a CUDA graph.
    Raises ValueError for a shape, dtype, stride or device it does not take, naming what it does.
    Kernels: csrc/sampling/penalize.cu, penalize.cpp
    """
    token_ids, slots, token_counts = as_tensor(token_ids), as_tensor(slots), as_tensor(token_counts)
    _check_token_counts("count_tokens", token_counts, None)
    require(
        token_ids.dim() == 1,
        f"count_tokens: token_ids has shape {list(token_ids.shape)}, but the op takes [num_seqs]",
    )
    _check_rows(
        "count_tokens", token_ids.shape[0], token_ids=(token_ids, torch.int32), slots=(slots, torch.int32)
    )
    check_device("count_tokens", token_ids=token_ids, slots=slots, token_counts=token_counts)
    torch.ops.fastkernels.count_tokens(token_ids, slots, token_counts)
    return token_counts


def _check_token_counts(op: str, token_counts: torch.Tensor, vocab_size: int | None) -> None:
    check_dtype(op, "token_counts", token_counts, (torch.int32,))
    check_shape(op, "token_counts", token_counts, (None, vocab_size), "[num_slots, vocab_size]")
    require(token_counts.is_contiguous(), f"{op}: token_counts must be contiguous")


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest log-probabilities of each row at temperature 1, largest first, and their ids.

    logits: [num_seqs, vocab_size] bf16 | fp16 | fp32; last dimension contiguous, any row stride
    k:      1 to vocab_size
    Returns (ids [num_seqs, k] int32, logprobs [num_seqs, k] fp32). The order of equal ones is not specified.
    Plain torch, for the API's logprobs: it allocates.
    Raises ValueError for a shape, dtype, stride or k it does not take, naming what it does.
    """
    logits = as_tensor(logits)
    _check_logits("top_logprobs", logits)
    require(
        1 <= k <= logits.shape[1],
        f"top_logprobs: k is {k}, but the op takes 1 to vocab_size ({logits.shape[1]})",
    )
    values, ids = torch.topk(logits.float(), k, dim=-1)
    return ids.int(), values - torch.logsumexp(logits.float(), dim=-1, keepdim=True)
