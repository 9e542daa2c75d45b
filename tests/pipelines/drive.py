"""A batch run as a process of its own, to be killed: `python -m tests.pipelines.drive '<json>'`.

Takes the arguments of `drive` as one JSON object. Exits as a job does.
"""

import dataclasses
import json
import sys
from typing import Any

import ray

from jobs.options import exit_code
from pipelines.batch import BatchOptions, Report, run_batch
from pipelines.corpus.listing import list_corpus
from pipelines.tasks.summarize import SummarizeOptions
from tests.pipelines.faults import Accident


def make_task(
    model: str, generation: dict[str, Any] | None = None, task: dict[str, Any] | None = None
) -> Accident:
    """Return the task of a run. `task` are the accidents, and what else is not the usual."""
    given = {"max_new_tokens": 16, "no_repeat_ngram_size": 3, "max_source_tokens": 512}
    given |= (generation or {}) | (task or {})
    options = {k: given.pop(k) for k in list(given) if k in SummarizeOptions.model_fields}
    made = Accident.from_options(SummarizeOptions(model=model, **options), device="cpu")
    return dataclasses.replace(made, **given)


def drive(
    *,
    corpus: str,
    output: str,
    model: str,
    generation: dict[str, Any] | None = None,
    task: dict[str, Any] | None = None,
    limit: int | None = None,
    num_cpus: int | None = None,
    **options: Any,
) -> Report:
    """Run the real job's pipeline over `corpus`, with `tests.pipelines.faults.Accident` as task."""
    if num_cpus is not None:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    accident = make_task(model, generation, task)
    listed = list_corpus([corpus], inputs=accident.inputs, id_column=None, kept={}, limit=limit)
    settings = {"device": "cpu", "rows_per_block": 8} | options
    return run_batch(accident, listed, output, options=BatchOptions(**settings))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    sys.exit(exit_code(lambda: drive(**arguments)))
