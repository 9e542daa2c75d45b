"""Ray graphs over `longformer_core`, and what they read, write and account for."""
