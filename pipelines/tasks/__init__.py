"""One file per task: row -> model inputs and model outputs -> columns, wherever the task runs."""
