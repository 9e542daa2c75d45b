"""Local, global and cross attention over packed documents."""

from longformer_core.attention.window import window_attention

__all__ = ["window_attention"]
