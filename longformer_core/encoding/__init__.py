"""Reading documents without writing: what heads and states say of each, by an engine."""
