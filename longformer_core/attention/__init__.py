"""Local, global and cross attention over packed documents."""

from longformer_core.attention.window import window_attention, window_attention_with_lse

__all__ = ["window_attention", "window_attention_with_lse"]
