"""A model directory behind HTTP: the shapes of Hugging Face and OpenAI, streams, honest limits."""
