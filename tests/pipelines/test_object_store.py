"""Input and output in an object store: a moto server stands in for S3, reached over HTTP."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.pipelines.driving import Trial, summaries, wait_for

BLOCK = 8


@pytest.fixture
def bucket(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that holds the corpus, behind AWS_ENDPOINT_URL for this process and its children."""
    log = tmp_path / "moto.txt"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    # Into a file: the server logs every request, and stands still when a pipe is full.
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(lambda: "Running on " in log.read_text(), "the moto server", 60.0)
        address = log.read_text().split("Running on ")[1].split()[0]
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        store = pafs.S3FileSystem(endpoint_override=address, allow_bucket_creation=True)
        store.create_dir("corpora")
        for file in corpus.glob("*.parquet"):
            with store.open_output_stream(f"corpora/in/{file.name}") as stream:
                stream.write(file.read_bytes())
        yield "s3://corpora"
    finally:
        server.terminate()
        server.wait()


def test_killed_and_resumed_in_an_object_store(
    bucket: str, trial: Trial, undisturbed: dict[str, str]
) -> None:
    trial.arguments |= {"corpus": f"{bucket}/in", "output": f"{bucket}/run"}
    driver = trial.start()
    wait_for(lambda: trial.num_committed() >= 10, "the tenth block")
    driver.kill()
    assert trial.start().wait() == 0, trial.said()
    assert summaries(trial.output) == undisturbed
    again = trial.num_begun() - len(undisturbed)
    assert 0 <= again <= 4 * BLOCK, f"{again} rows were worked on again"
