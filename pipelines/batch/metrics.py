"""What a run notes of itself while it goes on: lines of numbers, in whole files in `metrics/`."""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from pipelines.batch.ledger import Snapshot, Tally
from pipelines.run_directory.directory import Run

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Keeps lines until they are written together: object stores cannot append to a file."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._lines: list[str] = []

    def note(
        self, total: Tally, snapshot: Snapshot | None, operators: Sequence[dict[str, Any]]
    ) -> None:
        """Keep a line about how the run stands now."""
        line = {
            "time": time.time(),
            "rows": total.rows,
            "failed": total.failed,
            "tokens_in": total.tokens_in,
            "tokens_out": total.tokens_out,
            "blocks_begun": snapshot.num_begun if snapshot else 0,
            "worker_deaths": snapshot.num_deaths if snapshot else 0,
            "operators": operators,
        }
        self._lines.append(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Write what was noted since the last time, in a file of its own."""
        lines, self._lines = self._lines, []
        try:
            self._run.write_metrics(lines)
        except OSError as error:
            logger.warning("metrics cannot be written: %s", error)
