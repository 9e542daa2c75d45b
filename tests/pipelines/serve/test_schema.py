"""Every route of every task against its own schema: schemathesis, all checks, stateful too."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.pipelines.every_task import CASES
from tests.pipelines.serve.serving import Server

CONFIG = Path(__file__).with_name("schemathesis.toml")


def check(server: Server, folder: Path, num_examples: int) -> int:
    """Return how many requests were made; all of them must be answered as the schema says."""
    run = subprocess.run(
        [Path(sys.executable).with_name("st"), "--config-file", CONFIG, "run",
         f"{server.url}/openapi.json",
         "--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--seed", "6",
         "--max-examples", str(num_examples), "--continue-on-failure"],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "NO_COLOR": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:]
    found = re.search(r"(\d+) generated, \1 passed", run.stdout)
    assert found, run.stdout
    return int(found[1])


@pytest.mark.parametrize(
    "name", [n if n == "tag" else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_the_api_keeps_its_contract(
    name: str, server_of: Callable[[str], Server], tmp_path: Path
) -> None:
    server = server_of(name)
    assert check(server, tmp_path, 4 if name == "tag" else 60) > 150
    assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert server.host.queued_tokens == 0


def test_the_schema_says_what_the_model_can(server_of: Callable[[str], Server]) -> None:
    schemas = httpx.get(f"{server_of('summarize').url}/openapi.json").json()["components"][
        "schemas"
    ]
    (limits, _) = schemas["GenerateParameters"]["properties"]["max_new_tokens"]["anyOf"]
    assert limits == {"type": "integer", "minimum": 1, "maximum": 128}
    schemas = httpx.get(f"{server_of('embed').url}/openapi.json").json()["components"]["schemas"]
    (limits, _) = schemas["EmbedParameters"]["properties"]["dimensions"]["anyOf"]
    assert limits == {"type": "integer", "minimum": 32, "maximum": 32}
