"""Qwen2 and Qwen2.5: the shared decoder with a bias on q, k and v. Source: Yang et al. 2024."""

from fastkernels.models.decoder import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """The biases come by configuration (always on), as does the window of the upper layers (usually off)."""
