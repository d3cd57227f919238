"""Plain PyTorch definitions of the models fastkernels runs, one short file a family."""

from __future__ import annotations

from fastkernels.config import ModelConfig, UnsupportedModelError
from fastkernels.models.decoder import CausalLM
from fastkernels.models.llama import LlamaForCausalLM
from fastkernels.models.mistral import MistralForCausalLM
from fastkernels.models.qwen2 import Qwen2ForCausalLM
from fastkernels.models.qwen3 import Qwen3ForCausalLM

__all__ = ["ARCHITECTURES", "CausalLM", "UnsupportedModelError", "build"]

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def build(config: ModelConfig) -> CausalLM:
    """The model of ``config`` with unset weights, on torch's default device: use it under
    ``torch.device("meta")``.

    Raises UnsupportedModelError for an architecture that is not in ARCHITECTURES.
    """
    if config.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no definition of the architecture {config.architecture!r}; fastkernels knows "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.architecture](config).eval()
