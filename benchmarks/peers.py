"""Peers that are measured where they are at hand: vLLM's kernels, expressions under torch.compile."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def flash_attention_3() -> Callable[..., Any] | None:
    """FlashAttention 3 as vLLM ships it, or None; its pages are [page_size, num_kv_heads, head_dim]."""
    module = _vllm("vllm.vllm_flash_attn")
    return None if module is None else module.flash_attn_varlen_func


@functools.cache
def vllm_ops() -> Any | None:
    """vLLM's own kernels as torch.ops._C, or None."""
    return None if _vllm("vllm._custom_ops") is None else torch.ops._C


def vllm_name() -> str:
    """With its version, for the name of a peer."""
    return f"vLLM {importlib.import_module('vllm').__version__}"


def _vllm(name: str) -> Any | None:
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # present but built for another torch, say: measured without it, and said so
        print(f"{name} left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def compiled(expression: Callable[..., Any]) -> Callable[..., Any]:
    """The expression under torch.compile, for one shape: what was compiled before is forgotten."""
    torch.compiler.reset()
    return torch.compile(expression, fullgraph=True, dynamic=False)
