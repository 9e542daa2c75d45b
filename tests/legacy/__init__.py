"""Benchmarks: `python -m tests.bench.<name>`. They print JSON lines and are never timed tests."""
