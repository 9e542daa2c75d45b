"""`python -m jobs.summarize`: what it takes, what it refuses, and a run from end to end."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.torch import load_file, save_file

from jobs.options import exit_code
from jobs.summarize import summarize
from longformer_core.generation.config import GenerationConfig
from tests.helpers import corpus_texts
from tests.pipelines.driving import rows_of
from tests.pipelines.parquet import write

GENERATION = ["--num-beams", "2", "--max-new-tokens", "6"]


def job(*flags: Any) -> int:
    arguments = ["--device", "cpu", *map(str, flags)]
    return exit_code(lambda: summarize.main(arguments, standalone_mode=False))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything printed since the last look, in one line: tables fold long cells."""
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [text[:500] for text in corpus_texts(40)]
    columns = {"id": range(40), "text": texts, "year": range(1900, 1940)}
    write(folder / "a.parquet", {k: list(v)[:25] for k, v in columns.items()}, groups=[10, 15])
    write(folder / "b.parquet", {k: list(v)[25:] for k, v in columns.items()})
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may start Ray."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(ray.data, "read_datasource", started)


@pytest.fixture
def own_model(led_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(led_directory, tmp_path / "model"))


# --- options ---


def test_every_option_parses() -> None:
    given = {
        "input": (["--input", "a", "b", "c"], ("a",)),
        "more_input": ([], ("b", "c")),
        "output": (["--output", "o"], "o"),
        "model": (["--model", "m"], "m"),
        "text_column": (["--text-column", "body"], "body"),
        "text_columns": (["--text-columns", "title, body"], ("title", "body")),
        "separator": (["--separator", " "], " "),
        "instruction": (["--instruction", "Sum up: "], "Sum up: "),
        "id_column": (["--id-column", "key"], "key"),
        "keep_columns": (["--keep-columns", "x,y", "--keep-columns", "z"], ("x", "y", "z")),
        "keep_as": (["--keep-as", "x=z", "--keep-as", "y=w"], ("x=z", "y=w")),
        "limit": (["--limit", "5"], 5),
        "skip_bad_files": (["--skip-bad-files"], True),
        "num_beams": (["--num-beams", "4"], 4),
        "max_new_tokens": (["--max-new-tokens", "9"], 9),
        "min_length": (["--min-length", "0"], 0),
        "length_penalty": (["--length-penalty", "-0.5"], -0.5),
        "no_repeat_ngram_size": (["--no-repeat-ngram-size", "0"], 0),
        "early_stopping": (["--early-stopping", "never"], "never"),
        "do_sample": (["--do-sample"], True),
        "seed": (["--seed", "-3"], -3),
        "max_source_tokens": (["--max-source-tokens", "3"], 3),
        "on_long": (["--on-long", "error"], "error"),
        "window_tokens": (["--window-tokens", "50"], 50),
        "stride_tokens": (["--stride-tokens", "0"], 0),
        "max_rounds": (["--max-rounds", "1"], 1),
        "keep_levels": (["--keep-levels"], True),
        "num_sentences": (["--num-sentences", "3"], 3),
        "query": (["--query", "who pays"], "who pays"),
        "query_column": (["--query-column", "asked"], "asked"),
        "format": (["--format", "json"], "json"),
        "batch_tokens": (["--batch-tokens", "100"], 100),
        "rows_per_block": (["--rows-per-block", "1"], 1),
        "num_workers": (["--num-workers", "2"], 2),
        "device": (["--device", "cuda"], "cuda"),
        "dtype": (["--dtype", "float16"], "float16"),
        "max_errors": (["--max-errors", "2.5%"], "2.5%"),
        "dry_run": (["--dry-run"], True),
        "new_run": (["--new-run"], True),
        "address": (["--address", "host:1"], "host:1"),
        "stall_timeout_s": (["--stall-timeout-s", "1"], 1.0),
    }
    flags = [flag for words, _ in given.values() for flag in words]
    with summarize.make_context("summarize", flags) as context:
        assert context.params == {name: value for name, (_, value) in given.items()}


@pytest.mark.parametrize(
    "flags",
    [
        ["--limit", "0"],
        ["--num-beams", "0"],
        ["--num-beams", "two"],
        ["--max-source-tokens", "2"],
        ["--early-stopping", "yes"],
        ["--dtype", "int8"],
        ["--stall-timeout-s", "0"],
        ["--on-long", "window"],
        ["--stride-tokens", "-1"],
        ["--nonsense"],
    ],
)
def test_bad_values_are_usage_errors(
    flags: list[str], capsys: pytest.CaptureFixture[str], no_work: None
) -> None:
    assert job("--input", "a", "--output", "o", "--model", "m", *flags) == 2
    assert flags[0] in told(capsys)


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str], no_work: None) -> None:
    assert job("--help") == 0
    assert "--max-source-tokens" in told(capsys)


def test_a_yaml_file_gives_the_same_plan(
    tmp_path: Path,
    corpus: Path,
    led_directory: Path,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
) -> None:
    config = {
        "input": [str(corpus / "a.parquet"), str(corpus / "b.parquet")],
        "output": str(tmp_path / "run"),
        "model": str(led_directory),
        "keep_columns": ["year"],
        "early_stopping": True,
        "num_beams": 3,
        "limit": 30,
        "dry_run": True,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    assert job("--config", tmp_path / "job.yaml", "--num-beams", "4") == 0
    plan = told(capsys)
    flags = ["--input", config["input"][0], config["input"][1], "--output", config["output"]]
    flags += ["--model", config["model"], "--keep-columns", "year", "--early-stopping", "true"]
    assert job(*flags, "--num-beams", "4", "--limit", "30", "--dry-run") == 0
    assert told(capsys) == plan
    for word in ("30 rows in 2 files", "early_stopping=True", "num_beams=4", "keep"):
        assert word in plan
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config | {"num_beam": 3}))
    assert job("--config", tmp_path / "job.yaml") == 2
    assert "'num_beam' (did you mean 'num_beams'?)" in told(capsys)


# --- refusals ---


def test_problems_of_input_model_and_options_come_together(
    tmp_path: Path, own_model: Path, capsys: pytest.CaptureFixture[str], no_work: None
) -> None:
    write(tmp_path / "in/a.parquet", {"body": ["x"]})
    (tmp_path / "in/b.parquet").touch()
    flags = ["--input", tmp_path / "in", "--output", "ftp://host/run", "--model", own_model]
    flags += ["--max-source-tokens", "5000", "--max-new-tokens", "129"]
    flags += ["--keep-as", "nonsense", "--max-errors", "some"]
    assert job(*flags) == 2
    problems = told(capsys)
    for problem in (
        "a.parquet: no column 'text'; it has 'body'",
        "b.parquet: is empty (0 bytes)",
        "scheme ftp:// is not supported",
        "--max-source-tokens 5000: the model has 4096 positions",
        "129 new tokens, but the decoder has 128 positions",
        "--keep-as 'nonsense': give old=new",
        "--max-errors 'some'",
    ):
        assert problem in problems
    assert job("--output", tmp_path / "run", "--model", tmp_path / "no model") == 2
    problems = told(capsys)
    assert "--input: give at least one" in problems
    assert "--model: " in problems
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_an_incomplete_model_is_refused(
    tmp_path: Path,
    corpus: Path,
    own_model: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
) -> None:
    (own_model / name).unlink()
    flags = ["--input", corpus, "--output", tmp_path / "run", "--model", own_model]
    assert job(*flags) == 2
    assert f"--model: {own_model}" in told(capsys)


def test_a_damaged_model_is_refused(
    tmp_path: Path,
    corpus: Path,
    own_model: Path,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
) -> None:
    weights = own_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (own_model / "generation_config.json").write_text('{"num_beam_groups": 2, "num_beams": 4}')
    flags = ["--input", corpus, "--output", tmp_path / "run", "--model", own_model]
    assert job(*flags) == 2
    assert "model.safetensors is damaged" in told(capsys)


def test_generation_options_are_checked_against_the_model(
    tmp_path: Path,
    corpus: Path,
    own_model: Path,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
) -> None:
    flags = ["--input", corpus, "--output", tmp_path / "run", "--model", own_model, "--dry-run"]
    assert job(*flags, "--max-new-tokens", "128") == 0
    assert job(*flags, "--max-new-tokens", "129") == 2
    assert job(*flags, "--max-source-tokens", "4096") == 0
    assert job(*flags, "--max-source-tokens", "4097") == 2
    assert job(*flags, "--do-sample") == 0  # the model's own num_beams is 2
    assert job(*flags, "--do-sample", "--num-beams", "1") == 0
    (own_model / "generation_config.json").write_text('{"num_beam_groups": 2, "num_beams": 4}')
    assert job(*flags) == 2
    assert "num_beam_groups" in told(capsys)


def test_a_models_own_sampling_is_not_taken(
    tmp_path: Path, corpus: Path, own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_model / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}')
    flags = ["--input", corpus, "--output", tmp_path / "run", "--model", own_model, "--dry-run"]
    assert job(*flags) == 0
    assert "do_sample=False" in told(capsys)


def test_a_dry_run_writes_nothing_and_loads_nothing(
    tmp_path: Path,
    corpus: Path,
    own_model: Path,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
) -> None:
    # Weights that no LED could be made of: whoever loads them fails.
    weights = load_file(own_model / "model.safetensors")
    strange = {f"strange.{name}": tensor for name, tensor in weights.items()}
    save_file(strange, own_model / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "run"
    flags = ["--input", corpus, "--output", output, "--model", own_model, "--dry-run"]
    assert job(*flags, "--keep-as", "year=published") == 0
    plan = told(capsys)
    assert "40 rows in 2 files" in plan
    assert "year as published" in plan
    assert not output.exists()
    output.mkdir()
    assert job(*flags) == 0
    assert list(output.iterdir()) == []


def test_an_output_that_cannot_be_written(
    tmp_path: Path, corpus: Path, led_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/run")):
        assert job("--input", corpus, "--output", output, "--model", led_directory) == 2
        assert str(output) in told(capsys)
    (tmp_path / "notes.txt").touch()
    assert job("--input", corpus, "--output", tmp_path, "--model", led_directory) == 2
    assert "is not empty and not a run directory" in told(capsys)


# --- from end to end ---


@pytest.fixture(scope="module")
def finished(
    ray_session: None, corpus: Path, led_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run in a directory whose name is hard on everything that takes paths apart."""
    output = tmp_path_factory.mktemp("runs") / "run #1 100% [é] a=b"
    flags = ["--input", corpus, "--output", output, "--model", led_directory, *GENERATION]
    flags += ["--max-source-tokens", "64", "--rows-per-block", "8", "--keep-as", "year=published"]
    assert job(*flags) == 0
    return output


def test_a_run_from_end_to_end(finished: Path, corpus: Path, led_directory: Path) -> None:
    rows = rows_of(finished)
    given = pq.read_table(corpus).to_pylist()
    assert sorted(rows) == sorted(str(row["id"]) for row in given)
    assert len({row["summary"] for row in rows.values()}) > 30
    for row in given:
        assert rows[str(row["id"])]["published"] == row["year"]
        assert rows[str(row["id"])]["error"] is None
    task_generation = GenerationConfig.from_pretrained(led_directory).replace(max_new_tokens=6)
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["fingerprint"]["options"]["num_beams"] == task_generation.num_beams
    assert config["options"]["keep_as"] == ["year=published"]
    status = json.loads((finished / "status.json").read_text())
    assert status["status"] == "completed"
    assert status["rows"] == {"in": 40, "ok": 40, "failed": 0}
    names = {p.name for p in finished.iterdir()}
    assert names >= {"config.yaml", "output", "status.json", "_checkpoint", "_manifest.json"}
    assert "_owner.json" not in names


def test_the_same_command_again_does_nothing(
    finished: Path, corpus: Path, led_directory: Path, no_work: None, monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    flags = ["--output", finished, *GENERATION, "--max-source-tokens", "64"]
    flags += ["--keep-as", "year=published"]
    # From another directory, with relative names, and other options that change no row.
    monkeypatch.chdir(led_directory)
    relative = ["--input", os.path.relpath(corpus), "--model", "."]
    assert job(*flags, *relative, "--rows-per-block", "4", "--max-errors", "3") == 0
    assert "40 rows" not in told(capsys)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    assert job(*flags, *relative, "--new-run") == 2
    assert "--new-run, but this directory holds rows" in told(capsys)
    assert job(*flags, *relative, "--num-beams", "3", "--limit", "7") == 2
    problems = told(capsys)
    assert "options.num_beams was 2, is 3" in problems
    assert "input.a.parquet.rows was 25, is 7" in problems
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_weights_that_do_not_fit_end_the_run_in_words(
    ray_session: None,
    tmp_path: Path,
    corpus: Path,
    own_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = load_file(own_model / "model.safetensors")
    weights["led.encoder.strange.weight"] = weights.pop("led.encoder.layers.0.fc1.weight")
    save_file(weights, own_model / "model.safetensors", metadata={"format": "pt"})
    flags = ["--input", corpus, "--output", tmp_path / "run", "--model", own_model]
    assert job(*flags, *GENERATION) == 1
    # What Ray itself prints before is not ours.
    _, _, problem = told(capsys).rpartition("error: ")
    assert problem.startswith("longformer_core.errors.CheckpointError: the weights do not fit")
    assert "led.encoder.strange.weight" in problem
    assert "Traceback" not in problem
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert "led.encoder.strange.weight" in status["message"]
    assert not (tmp_path / "run" / "_SUCCESS").exists()


# --- a full disk ---


def all_cpus_free() -> bool:
    """Soon after its end a run holds nothing of the cluster: the next one needs the CPUs."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """Mount a disk of this size; False where nobody may mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(command, capture_output=True, check=False).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def test_no_room_is_refused_before_work(
    tmp_path: Path,
    corpus: Path,
    led_directory: Path,
    capsys: pytest.CaptureFixture[str],
    no_work: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with small_disk(tmp_path / "disk", 8192) as mounted:
        if not mounted:
            usage = shutil.disk_usage(tmp_path)._replace(free=8192)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        output = tmp_path / "disk" / "run"
        assert job("--input", corpus, "--output", output, "--model", led_directory) == 2
        assert "8,192 bytes free, the output may need" in told(capsys)
        assert not output.exists()


def test_a_disk_that_fills_up_ends_the_run_and_it_goes_on_later(
    ray_session: None,
    tmp_path: Path,
    corpus: Path,
    led_directory: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "disk" / "run"
    filler = tmp_path / "disk" / "filler"

    def fill_up(mounted: bool) -> None:
        """As soon as two blocks are durable, leave no room for more."""
        deadline = time.monotonic() + 120
        while len(list((output / "output").glob("*.parquet"))) < 2:
            if time.monotonic() > deadline:
                return
            time.sleep(0.005)
        if not mounted:  # the next best: a place that takes no files
            (output / "output").rename(output / "away")
            (output / "output").touch()
            return
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))

    flags = ["--input", corpus, "--output", output, "--model", led_directory, *GENERATION]
    flags += ["--max-source-tokens", "64", "--rows-per-block", "4", "--keep-as", "year=published"]
    with small_disk(tmp_path / "disk", 2**21) as mounted:
        thread = threading.Thread(target=fill_up, args=(mounted,))
        thread.start()
        assert job(*flags) == 1
        assert all_cpus_free()
        thread.join()
        problems = told(capsys)
        _, _, problem = problems.partition("error: ")
        assert ("No space left" if mounted else "Not a directory") in problem
        assert "the same command goes on from here" in problem
        assert "Traceback" not in problem
        assert not (output / "_SUCCESS").exists()
        if mounted:
            filler.unlink()
        else:
            (output / "output").unlink()
            (output / "away").rename(output / "output")
        assert job(*flags) == 0
        assert "done before" in told(capsys)
        assert rows_of(output) == rows_of(finished)
