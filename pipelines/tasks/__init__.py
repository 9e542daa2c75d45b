"""One file a task. Every graph takes tasks from here; none is loaded before it is asked for."""
