"""Hugging Face checkpoint folders: weights, tokenizer, chat templates, generation defaults."""

from fastkernels.checkpoint.chat_template import ChatTemplateError
from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.generation_config import GenerationConfig, read_generation_config
from fastkernels.checkpoint.reader import DEMO_FOLDER, Checkpoint, model_folder
from fastkernels.checkpoint.text_stream import TextStream
from fastkernels.checkpoint.tokenizer import Tokenizer
from fastkernels.checkpoint.weights import load_weights
from fastkernels.checkpoint.writer import write_checkpoint

__all__ = [
    "DEMO_FOLDER",
    "ChatTemplateError",
    "Checkpoint",
    "CheckpointError",
    "GenerationConfig",
    "TextStream",
    "Tokenizer",
    "load_weights",
    "model_folder",
    "read_generation_config",
    "write_checkpoint",
]
