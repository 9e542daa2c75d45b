"""Writing a text about each document: options, search, and the engine that drives the model."""
