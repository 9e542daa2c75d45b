"""Writing a text about each document: options, search, and the engine that drives the model."""

from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine, Generation, Request

__all__ = ["Engine", "Generation", "GenerationConfig", "Request"]
