"""The published `config.json` of Longformer and LED, read, checked and written."""

from longformer_core.config.led import LEDConfig
from longformer_core.config.longformer import LongformerCausalConfig, LongformerConfig

__all__ = ["LEDConfig", "LongformerCausalConfig", "LongformerConfig"]
