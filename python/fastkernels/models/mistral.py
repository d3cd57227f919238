"""Mistral 7B: the shared decoder with a sliding window in every layer. Source: Jiang et al. 2023."""

from fastkernels.models.decoder import CausalLM


class MistralForCausalLM(CausalLM):
    """The window comes by configuration: ``ModelConfig.sliding_window``."""
