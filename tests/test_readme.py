"""The README is held to the code: its commands parse, its names and tables are the real ones."""

import contextlib
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import click
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.dashboard.modules.job.cli import submit
from ray.scripts.scripts import start
from starlette.routing import Route

from jobs.cli import longhaul
from jobs.options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from pipelines import rows
from pipelines.errors import BudgetExceeded
from pipelines.run_directory import directory as runs
from pipelines.run_directory.schemas import State
from pipelines.serve.api import Usage
from pipelines.serve.app import make_app, usage_headers
from pipelines.serve.config import write_config
from pipelines.serve.host import EngineHost
from pipelines.serve.options import ServeOptions, make_task
from pipelines.serve.service import Answer, Service
from pipelines.serve.shapes import shape_of
from tests.helpers import corpus_texts
from tests.pipelines.every_task import CASES
from tests.pipelines.serve.serving import on_loopback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", README)
SUMMARIZE = longhaul.commands["summarize"]


def blocks(language: str) -> list[str]:
    """Return the content of every fenced block in one language."""
    return [text for found, text in FENCE.findall(README) if found == language]


def command_lines() -> Iterator[list[str]]:
    """Yield the words of every command in a shell block or between backticks."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    spans = [s for s in re.findall(r"`([^`\n]+)`", PROSE) if s.startswith(("make ", "longhaul "))]
    for line in [*lines, *spans]:
        words = list(itertools.takewhile(">".__ne__, shlex.split(line, comments=True)))
        if words:
            yield words


def calls_of(*start_words: str) -> list[list[str]]:
    """Return the arguments of every command that begins so, alone or inside another one."""
    found = []
    for words in command_lines():
        for place in range(len(words)):
            if tuple(words[place : place + len(start_words)]) == start_words:
                found.append(words[place + len(start_words) :])
    return found


def options_of(command: click.Command) -> set[str]:
    return {name for p in command.params for name in p.opts} | {"--help"}


def table_under(header: str) -> list[list[str]]:
    """Return the cells of the table whose header row begins with these cells."""
    lines = README.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def parse(command: click.Command, arguments: list[str]) -> None:
    """Parse without running. Asking for help is no error."""
    with contextlib.suppress(click.exceptions.Exit):
        command.make_context(str(command.name), arguments)


@pytest.fixture
def beside_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go where the files stand that the README's commands read."""
    (tmp_path / "job.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    config = write_config(ServeOptions(model="led", device="cpu"), "0.0.0.0", 8000)
    (tmp_path / "serve.yaml").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("beside_the_readme")
def test_every_command_of_ours_parses() -> None:
    calls = calls_of("longhaul")
    for job in ("summarize", "convert", "demo"):
        calls += [[job, *arguments] for arguments in calls_of("python", "-m", f"jobs.{job}")]
    assert {name for name, *_ in calls} == set(longhaul.commands)
    for name, *arguments in calls:
        parse(longhaul.commands[name], arguments)


def test_every_command_of_rays_parses() -> None:
    assert len(calls_of("ray", "job", "submit")) == 1
    assert calls_of("ray", "start")
    for arguments in calls_of("ray", "job", "submit"):
        parse(submit, arguments)
    for arguments in calls_of("ray", "start"):
        parse(start, arguments)


def test_the_commands_of_a_cluster_stand_in_one_marked_block() -> None:
    marked = README.partition("<!-- test: submit -->\n")[2]
    match = FENCE.match(marked)
    assert match is not None
    for words in ("RAY_AUTH_MODE=token", "umask 077", "ray start --head", "ray job submit"):
        assert words in match[2]


def test_every_make_target_and_variable_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
    calls = calls_of("make")
    assert {"demo", "test", "check", "gpu"} <= {words[0] for words in calls}
    for target, *rest in calls:
        assert target in targets
        assert {word.partition("=")[0] for word in rest} <= variables


def test_every_option_in_the_text_is_an_option_of_ours() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PROSE))
    known = {option for command in longhaul.commands.values() for option in options_of(command)}
    assert "--max-errors" in named
    assert named <= known


def test_the_option_file_names_options() -> None:
    known = {p.name for p in SUMMARIZE.params}
    keys = {line.partition(":")[0] for line in blocks("yaml")[0].splitlines()}
    assert keys
    assert keys <= known


def test_the_columns_are_the_schema() -> None:
    schema = rows.output_schema(pa.schema([("summary", pa.large_string())]), pa.schema([]))
    expected = [[f"`{f.name}`", str(f.type).partition("<")[0]] for f in schema]
    assert [row[:2] for row in table_under("column | type")] == expected
    for field in rows.ERROR:
        assert f"`{field.name}`" in README


def test_stages_errors_and_states_are_the_contract() -> None:
    assert {row[0].strip("`") for row in table_under("type | what happened")} == set(
        rows.ERROR_TYPES
    )
    assert words_after("`error.stage` is") == set(rows.STAGES)
    assert words_after("`status.json` says") == set(get_args(State))


def words_after(start_of_sentence: str) -> set[str]:
    """Return the words between backticks up to the end of a sentence or clause."""
    rest = re.split(r"[.;]\s", PROSE.partition(start_of_sentence)[2], maxsplit=1)[0]
    return set(re.findall(r"`(\w+)`", rest))


def test_the_run_directory_is_drawn_as_it_is() -> None:
    drawn = next(text for text in blocks("text") if "_SUCCESS" in text)
    assert runs.__doc__ is not None
    real = re.findall(r"^    (\S+)  ", runs.__doc__, re.MULTILINE)
    assert [line.split()[0] for line in drawn.splitlines()] == real


def test_the_exit_codes_are_the_real_ones() -> None:
    codes = [int(row[0]) for row in table_under("code | meaning")]
    assert codes == [
        0,
        EXIT_FAILED,
        EXIT_USAGE,
        BudgetExceeded.exit_code,
        EXIT_INTERRUPTED,
        128 + signal.SIGTERM,
    ]
    assert 128 + signal.SIGINT == EXIT_INTERRUPTED


def test_the_python_that_reads_a_result_reads_it(beside_the_readme: Path) -> None:
    (beside_the_readme / "run" / "output").mkdir(parents=True)
    for name, ids in (("a", ["1", "2"]), ("b", ["3"]), ("left_over", ["2"])):
        pq.write_table(pa.table({"id": ids}), f"run/output/{name}.parquet")
    listed = [{"path": f"output/{name}.parquet"} for name in ("a", "b")]
    (beside_the_readme / "run" / "_manifest.json").write_text(json.dumps({"files": listed}))
    names: dict[str, pa.Table] = {}
    *_, code = blocks("python")
    exec(compile(code, "README.md", "exec"), names)
    assert names["rows"]["id"].to_pylist() == ["1", "2", "3"]


def test_the_first_example_runs(
    beside_the_readme: Path,
    ray_session: None,
    led_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(led_directory, "led")
    Path("reports").mkdir()
    pq.write_table(pa.table({"text": corpus_texts(4)}), "reports/a.parquet")
    code, *_ = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "4 of 4 rows are in run/output" in capsys.readouterr().out
    assert (beside_the_readme / "run" / "_SUCCESS").exists()


def test_the_commands_of_serving_are_served(
    led_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The curl line and the clients, against a server at another port."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    options = ServeOptions(model=str(led_directory), name="led", device="cpu")
    task = make_task(options)
    host = EngineHost(task, device="cpu", max_queued_tokens=10**6)
    with on_loopback(make_app(Service(task, host, options))) as url:
        _, curl = (
            README.partition("<!-- test: serve -->\n")[2].split("```")[1].strip().split("\n")[1:]
        )
        told = subprocess.run(
            curl.replace("http://127.0.0.1:8000", url),
            shell=True, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert json.loads(told.stdout)[0]["usage"]["windows"] == 1
        code = next(text for text in blocks("python") if "InferenceClient" in text)
        exec(compile(code.replace("http://127.0.0.1:8000", url), "README.md", "exec"), {})
    first, second = capsys.readouterr().out.split("\n", 1)
    assert first.strip()
    assert second.strip()


def test_the_routes_and_headers_of_serving_are_there(model_of: Callable[[str], Path]) -> None:
    named = set(re.findall(r"`(/[\w/-]*)`", README))
    served: set[str] = {"/metrics"}  # with Ray Serve only
    for name in CASES:
        options = ServeOptions(model=str(model_of(name)), device="cpu")
        app = make_app(Service(make_task(options), cast(Any, None), options))
        served |= {route.path for route in app.routes if isinstance(route, Route)}
        assert shape_of(make_task(options)).path in named
    assert named <= served
    usage = Usage(tokens_in=1, tokens_out=1, windows=1, truncated=False, coverage=1.0)
    headers = usage_headers([Answer({}, usage)])
    assert set(re.findall(r"`(x-longhaul-[a-z-]+)`", README)) == {*headers}


def test_the_house_map_and_the_links_name_what_is_there() -> None:
    drawn = next(text for text in blocks("text") if "longformer_core/" in text)
    parent = ROOT
    for line in drawn.splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else ROOT / name
        assert (parent / name if line.startswith(" ") else parent).is_dir(), name
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", ["README.md", "Makefile", ".ci/run", "pyproject.toml"])
def test_no_address_of_the_outside_world(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    known = {"http://head:8265", "http://127.0.0.1:8000"}
    assert set(re.findall(r"https?://[^\s/\"]+", text)) <= known
