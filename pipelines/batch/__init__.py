"""Batch inference: a task over a corpus into a run directory."""

from pipelines.batch.driver import BatchOptions, Report, run_batch

__all__ = ["BatchOptions", "Report", "run_batch"]
