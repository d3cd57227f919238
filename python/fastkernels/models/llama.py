"""Llama 2 and 3.x: the shared decoder as it stands. Source: Touvron et al. 2023; Grattafiori et al. 2024."""

from fastkernels.models.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """Llama 3.x adds grouped key-value heads and the llama3 rotary scaling, both by configuration."""
