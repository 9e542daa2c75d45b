"""What every job's command line shares: a flat YAML beside the flags, exit codes, error text."""

from pathlib import Path
from typing import Any

import click
import pytest

from jobs.options import collect, exit_code, read_yaml, run
from longformer_core.errors import ConfigError
from pipelines.errors import BudgetExceeded, Refused, RunFailed, Stalled

seen: dict[str, Any] = {}


@click.command()
@click.option("--input", multiple=True)
@click.argument("more_input", nargs=-1)
@click.option("--output", required=True)
@click.option("--count", type=click.IntRange(min=1), default=5)
@click.option("--share", type=float)
@click.option("--mode", type=click.Choice(["true", "false", "never"]))
@click.option("--quiet", is_flag=True)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    callback=read_yaml,
    expose_value=False,
)
def job(**options: Any) -> None:
    seen.clear()
    seen.update(options)


def called(tmp_path: Path, text: str | bytes, *flags: str) -> dict[str, Any]:
    """The options that a job sees with this YAML and these flags."""
    file = tmp_path / "job.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    job.main(["--config", str(file), *flags], standalone_mode=False)
    return dict(seen)


def refused(tmp_path: Path, text: str | bytes, *flags: str) -> str:
    with pytest.raises(click.UsageError) as error:
        called(tmp_path, text, "--output", "o", *flags)
    return error.value.format_message()


def test_every_kind_of_value(tmp_path: Path) -> None:
    text = "input: [a/, 2020]\noutput: run\ncount: 7\nshare: 0.5\nmode: never\nquiet: true\n"
    assert called(tmp_path, text) == {
        "input": ("a/", "2020"),
        "more_input": (),
        "output": "run",
        "count": 7,
        "share": 0.5,
        "mode": "never",
        "quiet": True,
    }


@pytest.mark.parametrize(
    ("text", "mode"),
    [("true", "true"), ("false", "false"), ("'true'", "true"), ("never", "never"), ("on", "true")],
)
def test_a_boolean_may_stand_for_a_word(tmp_path: Path, text: str, mode: str) -> None:
    assert called(tmp_path, f"output: o\nmode: {text}")["mode"] == mode


def test_one_value_may_stand_for_a_list(tmp_path: Path) -> None:
    assert called(tmp_path, "output: o\ninput: corpus/")["input"] == ("corpus/",)


def test_flags_win(tmp_path: Path) -> None:
    text = "input: [a, b]\noutput: o\ncount: 7\nmode: true\nquiet: false"
    flags = ["--input", "c", "--output", "p", "--count", "8", "--mode", "never", "--quiet"]
    told = called(tmp_path, text, *flags)
    assert told["input"] == ("c",)
    assert (told["output"], told["count"], told["mode"], told["quiet"]) == ("p", 8, "never", True)
    # The place of --config among the flags does not matter.
    job.main(["--count", "9", "--config", str(tmp_path / "job.yaml")], standalone_mode=False)
    assert seen["count"] == 9


@pytest.mark.parametrize("text", ["", "# only a comment", "count: null", "{}"])
def test_nothing_said_is_the_default(tmp_path: Path, text: str) -> None:
    assert called(tmp_path, text, "--output", "o")["count"] == 5
    with pytest.raises(click.UsageError, match="output"):
        called(tmp_path, text)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    told = refused(tmp_path, "cuont: 3\nzzzz: 1\n5: x")
    assert "'cuont' (did you mean 'count'?)" in told
    assert "'zzzz'" in told
    assert "5" in told
    # The argument behind `--input a b c` and the file itself are no options of a file.
    assert "unknown option 'config'" in refused(tmp_path, "config: x")
    assert "'more_input'" in refused(tmp_path, "more_input: [x]")
    assert "count takes one value, not [1, 2]" in refused(tmp_path, "count: [1, 2]")
    assert "count takes one value" in refused(tmp_path, "count: {a: 1}")
    assert "input takes a value or a flat list" in refused(tmp_path, "input: [[a]]")
    for text in ("- a\n- b", "just words", "0", "false"):
        assert "must hold option names and values" in refused(tmp_path, text)
    for broken in ("a: [", b"\xff\xfe\xff", "a: b: c", "\tx: 1"):
        assert "is not YAML" in refused(tmp_path, broken)


@pytest.mark.parametrize("text", ["count: 0", "count: many", "share: x", "mode: sometimes"])
def test_values_are_checked_as_flags_are(tmp_path: Path, text: str) -> None:
    assert "Invalid value for '--" in refused(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match=r"nowhere\.yaml"):
        job.main(["--config", str(tmp_path / "nowhere.yaml")], standalone_mode=False)


def raising(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Refused(["one", "two"]), 2, "error: one\nerror: two\n"),
        (RunFailed("broke"), 1, "error: broke\n"),
        (Stalled("nothing moved"), 1, "error: nothing moved\n"),
        (BudgetExceeded("5 rows"), 3, "error: 5 rows\n"),
        (KeyboardInterrupt(), 130, ""),
        (click.Abort(), 130, ""),
        (click.exceptions.Exit(7), 7, ""),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, told: str
) -> None:
    assert exit_code(raising(error)) == code
    assert capsys.readouterr() == ("", told)


def test_success_and_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["job", "--output", "o"])
    assert run(job) == 0
    monkeypatch.setattr("sys.argv", ["job", "--nonsense"])
    assert run(job) == 2
    assert "--nonsense" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))


def test_problems_are_collected() -> None:
    problems = ["first"]
    with collect(problems):
        raise Refused(["second", "third"])
    with collect(problems):
        raise ConfigError("fourth")
    assert problems == ["first", "second", "third", "fourth"]
    with pytest.raises(KeyError), collect(problems):
        raise KeyError("a bug")
