"""Options and Serve's YAML: what is wrong is said before anything starts."""

import io
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs.options import exit_code
from jobs.serve import serve
from pipelines.errors import Refused
from pipelines.serve.keys import hash_key
from pipelines.serve.options import ServeOptions, check_free, check_open, make_task
from pipelines.serve.scaling import STATISTIC, by_queued_tokens
from tests.pipelines.every_task import CASES
from tests.pipelines.every_task import make_task as batch_task


@pytest.fixture(scope="module")
def config(led_directory: Path) -> dict[str, Any]:
    """A config that the command prints."""
    pytest.importorskip("ray.serve")
    from pipelines.serve.config import write_config

    options = ServeOptions(model=str(led_directory), device="cpu", max_replicas=3)
    found: dict[str, Any] = yaml.safe_load(write_config(options, "127.0.0.1", 8000))
    return found


def test_what_is_printed_is_correct(
    led_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*words: str, given: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        code = exit_code(lambda: serve.main([*words], standalone_mode=False))
        return (code, *capsys.readouterr())

    given = ("--model", str(led_directory), "--device", "cpu", "--print-config")
    code, printed, talk = command(*given)
    assert (code, talk) == (0, "")
    assert command("--check", "-", given=printed)[:2] == (0, f"{led_directory.name}: correct\n")
    broken = printed.replace("max_queued_requests", "max_queued_requestz")
    code, _, talk = command("--check", "-", given=broken)
    assert code == 2
    assert "did you mean 'max_queued_requests'" in talk


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("proxy_locationn",), "EveryNode", "did you mean 'proxy_location'"),
        (("http_options", "hosts"), "a", "did you mean 'host'"),
        (("http_options", "port"), "many", "http_options.port"),
        (("logging_config", "encodin"), "JSON", "did you mean 'encoding'"),
        (("applications", 0, "route_prefixx"), "/", "did you mean 'route_prefix'"),
        (("applications", 0, "args", "modle"), "x", "did you mean 'model'"),
        (("applications", 0, "args", "timeout_s"), -1, "args.timeout_s"),
        (("applications", 0, "import_path"), "somebody.elses:app", "no application"),
        (("applications", 0, "deployments", 0, "name"), "Gatewy", "did you mean 'Gateway'"),
        (("applications", 0, "deployments", 0, "num_replica"), 2, "did you mean 'num_replicas'"),
        (("applications", 0, "deployments", 1, "autoscaling_config", "max_replicass"), 2,
         "did you mean 'max_replicas'"),
        (("applications", 0, "deployments", 1, "ray_actor_options", "num_cpu"), 2,
         "did you mean 'num_cpus'"),
        (("applications", 0, "deployments", 1, "backpressure_config", "status"), 429, "status"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config(
    config: dict[str, Any], place: tuple[Any, ...], value: Any, said: str
) -> None:
    from pipelines.serve.config import check_config

    changed: Any = yaml.safe_load(yaml.safe_dump(config))
    assert check_config(yaml.safe_dump(changed))
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    with pytest.raises(Refused, match=said):
        check_config(yaml.safe_dump(changed))


@pytest.mark.parametrize("name", CASES)
def test_a_server_has_the_task_of_the_batch_job(name: str, model_of: Callable[[str], Path]) -> None:
    """The directory says which; options are the batch command's."""
    case = CASES[name]
    given = {k: v for k, v in case.options.items() if not k.endswith("_column")}
    options = ServeOptions(
        model=str(model_of(name)),
        device="cpu",
        window_tokens=128,
        batch_tokens=8192,
        task_option=tuple(f"{key}={value}" for key, value in given.items()),
    )
    task = make_task(options)
    expected = batch_task(case, model_of(name), on_long="windows", window_tokens=128)
    assert type(task) is type(expected)
    assert task.options.on_long == "error"
    assert task.window_tokens == 128
    left_out = {"on_long", "batch_tokens", *(k for k in case.options if k.endswith("_column"))}
    assert task.options.model_dump(exclude=left_out) == expected.options.model_dump(
        exclude=left_out
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": "tag"}, "fits the task summarize"),
        ({"task_option": ("num_beamz=3",)}, "did you mean 'num_beams'"),
        ({"task_option": ("num_beams=many",)}, "num_beams"),
        ({"max_source_tokens": 10**6}, "positions"),
        ({"min_replicas": 3, "max_replicas": 2}, "below --min-replicas"),
    ],
)
def test_wrong_options(led_directory: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        make_task(ServeOptions(model=str(led_directory), device="cpu", **options))


def test_others_are_let_in_with_keys_only(tmp_path: Path) -> None:
    options = ServeOptions(model="led")
    check_open(options, "127.0.0.1", insecure=False)
    with pytest.raises(Refused, match="keys"):
        check_open(options, "0.0.0.0", insecure=False)
    check_open(options, "0.0.0.0", insecure=True)
    check_open(options.model_copy(update={"keys_file": "k"}), "0.0.0.0", insecure=False)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Refused, match=f"--port {port}"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)


def test_a_new_key(capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--new-key"], standalone_mode=False)
    printed = capsys.readouterr()
    digest, name = printed.out.split()
    assert (digest, name) == (hash_key(printed.err.split()[-1]), "NAME")


def test_the_first_request_brings_a_replica() -> None:
    for requests, expected in ((0, 0), (3, 1)):
        context = SimpleNamespace(
            aggregated_metrics={}, target_num_replicas=0, total_num_requests=requests
        )
        assert by_queued_tokens(context)[0] == expected


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (None, 2),
        ({}, 2),
        ({"a": 0.0, "b": 0.0}, 1),
        ({"a": 0.4, "b": 0.4}, 1),
        ({"a": 0.6, "b": 0.6}, 2),
        ({"a": 2.5, "b": 0.0}, 3),
        ({"a": 99.0}, 4),
    ],
)
def test_the_policy_follows_the_queue(reported: dict[str, float] | None, expected: int) -> None:
    context = SimpleNamespace(
        aggregated_metrics=reported and {STATISTIC: reported},
        target_num_replicas=2,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
    )
    assert by_queued_tokens(context)[0] == expected
