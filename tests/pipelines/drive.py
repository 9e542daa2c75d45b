"""A batch run as a process of its own, to be killed: `python -m tests.pipelines.drive '<json>'`.

Takes the arguments of `drive` as one JSON object. Exits as a job does.
"""

import json
import sys
from typing import Any

import ray

from jobs.options import exit_code
from jobs.summarize import fingerprint_of
from longformer_core.generation.config import GenerationConfig
from pipelines.batch.driver import BatchOptions, Report, run_batch
from pipelines.corpus.listing import list_corpus
from pipelines.rows import InputColumn
from pipelines.storage import locate
from tests.pipelines.faults import Accident


def make_task(
    model: str, generation: dict[str, Any] | None = None, task: dict[str, Any] | None = None
) -> Accident:
    """Return the task of a run. `task` are the accidents, and what else is not the usual."""
    settings = {"max_new_tokens": 16, "no_repeat_ngram_size": 3} | (generation or {})
    options = GenerationConfig.from_pretrained(model).replace(**settings)
    return Accident(model=model, generation=options, **{"max_source_tokens": 512} | (task or {}))


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
    listed = list_corpus(
        [corpus], inputs=[InputColumn("text", ("text",))], id_column=None, kept={}, limit=limit
    )
    accident = make_task(model, generation, task)
    return run_batch(
        accident,
        listed,
        locate(output),
        fingerprint=fingerprint_of(accident, listed),
        recorded={},
        options=BatchOptions(**{"device": "cpu", "rows_per_block": 8} | options),
    )


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    sys.exit(exit_code(lambda: drive(**arguments)))
