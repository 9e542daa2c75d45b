"""Chaos, overload, bursts and hours of load, on the whole server. Minutes each."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers import MEDIUM, make_led_directory
from tests.pipelines.every_task import CASES, good_rows, make_task
from tests.pipelines.serve.cluster import Command, Load, Outcome, failures, served, wait_until
from tests.pipelines.tasks.heads import answers

pytestmark = pytest.mark.slow

DECODING = {"num_beams": 2, "max_new_tokens": 24, "min_length": 24}
FLAGS = [f"--task-option={name}={value}" for name, value in DECODING.items()]
TEXTS = [row["text"] for row in good_rows(24)]
BODIES: list[dict[str, Any]] = [{"inputs": text} for text in TEXTS]
# Redeploys what runs, as an operator would: every replica is replaced, or some go.
_UPDATE = """
import sys, json, logging
from ray import serve
import ray
from pipelines.serve.application import build
from pipelines.serve.running import APPLICATION
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
serve.run(build(json.loads(sys.argv[2])), name=APPLICATION, route_prefix="/")
"""


@pytest.fixture(scope="module")
def expected(led_directory: Path) -> list[str]:
    """The batch job's rows."""
    task = make_task(CASES["summarize"], led_directory, **DECODING)
    found = [row["summary"] for row in answers(task, text=TEXTS)]
    assert len(set(found)) > 12
    return found


def count(outcomes: list[Outcome]) -> str:
    """Say what requests came to, for the log."""
    seconds = sorted(each.seconds for each in outcomes)
    whole = Counter((each.is_streamed, each.is_whole) for each in outcomes)
    return (
        f"{len(outcomes)} requests: plain {whole[False, True]} ok {whole[False, False]} not, "
        f"streams {whole[True, True]} whole {whole[True, False]} broken; "
        f"median {seconds[len(seconds) // 2]:.2f} s, slowest {seconds[-1]:.2f} s"
    )


def test_chaos(led_directory: Path, tmp_path: Path, expected: list[str]) -> None:
    """At least eight kills, then a rolling update and a scale-down, under mixed load."""
    with served(tmp_path, led_directory, "--min-replicas=2", *FLAGS) as command:
        with Load(command.url, BODIES, num_clients=12) as load:
            load.wait_for(40)
            for kind in ("Model", "Gateway", "ServeController", "Model", "Gateway") * 2:
                wait_until(lambda kind=kind: len(command.parts(kind)) > 0, f"no {kind} is left")
                command.parts(kind)[0].kill()
                load.wait_for(60, 120)
                wait_until(lambda: len(command.parts("Model")) == 2, "replicas stay away")
                wait_until(lambda: len(command.parts("Gateway")) == 2, "gateways stay away")
                load.wait_for(20, 120)
            print("kills:", count(load.outcomes))
            killed = len(load.outcomes)
            update(command, led_directory, min_replicas=2, timeout_s=299.0)
            load.wait_for(60, 120)
            updated = len(load.outcomes)
            print("update:", count(load.outcomes[killed:]))
            update(command, led_directory, min_replicas=1, timeout_s=299.0)
            wait_until(lambda: len(command.parts("Model")) == 1, "no replica went", 120)
            load.wait_for(60, 120)
            print("scale-down:", count(load.outcomes[updated:]))
        assert failures(load.outcomes, expected) == []
        # An update drains: no stream breaks. Of the kills only those of gateways may break some.
        assert all(each.is_whole for each in load.outcomes[killed:])
        assert sum(not each.is_whole for each in load.outcomes) <= 4 * 12
        assert command.end() == 0


def update(command: Command, model: Path, **options: Any) -> None:
    """Deploy the same model with other options on the server's own cluster."""
    address, token = address_of(command)
    environment = os.environ | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token})
    given = {"model": str(model), "device": "cpu", "threads": 1, **options}
    given["task_option"] = [f"{name}={value}" for name, value in DECODING.items()]
    subprocess.run(
        [sys.executable, "-c", _UPDATE, address, json.dumps(given)],
        env=environment, check=True, timeout=240,
    )  # fmt: skip


def address_of(command: Command) -> tuple[str, str]:
    """Return the address of a server's own cluster, and the file of its token."""
    for each in psutil.Process(command.process.pid).children(recursive=True):
        words = each.cmdline()
        found = [word for word in words if word.startswith("--gcs-address=")]
        if found:
            return found[0].split("=", 1)[1], each.environ().get("RAY_AUTH_TOKEN_PATH", "")
    raise AssertionError("the cluster has no address")


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is slow enough for refusals to cost little beside it."""
    return make_led_directory(
        tmp_path_factory.mktemp("heavy") / "model",
        attention_window=[64] * 4,
        **MEDIUM,
    )


HEAVY = ["--task-option=num_beams=4", "--task-option=max_new_tokens=60",
         "--task-option=min_length=60", "--threads=1", "--min-replicas=1"]  # fmt: skip


def offer(url: str, per_s: float, seconds: float) -> list[Outcome]:
    """Ask so many times a second, whether earlier requests are answered or not."""
    outcomes: list[Outcome] = []
    # One for all: to make a client costs as much as to refuse it.
    client = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=200))
    load = Load(url, BODIES, 0)

    def ask(number: int) -> None:
        outcome = Outcome(number % len(BODIES), False, time.monotonic())
        try:
            load._plain(client, outcome)
        except httpx.HTTPError as error:
            outcome.error = repr(error)
        outcome.seconds = time.monotonic() - outcome.began
        outcomes.append(outcome)

    threads = []
    began = time.monotonic()
    for number in range(int(per_s * seconds)):
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        time.sleep(max(0.0, began + (number + 1) / per_s - time.monotonic()))
    for thread in threads:
        thread.join()
    client.close()
    return outcomes


def test_overload(heavy: Path, tmp_path: Path) -> None:
    """Ten times what it can: what is taken is done in time, the rest is told when to come.

    Then nobody comes any more, and who was told when it would be over was told right.
    """
    limit_s = 30.0
    words = [*HEAVY, "--max-queued-tokens=2000", f"--timeout-s={limit_s:g}"]
    with served(tmp_path, heavy, *words) as command:
        with Load(command.url, BODIES, num_clients=12, share_streamed=0) as load:
            load.wait_for(15, 120)
            peak = rate(load, 20)
        began = time.monotonic()
        with httpx.Client(timeout=60) as client:
            Load(command.url, BODIES, 0)._plain(client, Outcome(0, False, 0.0))
        calm_s = time.monotonic() - began
        began = time.monotonic()
        outcomes = offer(command.url, 10 * peak, 60)
        taken = [each for each in outcomes if each.status == 200]
        refused = [each for each in outcomes if each.status == 429]
        assert len(taken) + len(refused) == len(outcomes), Counter(e.status for e in outcomes)
        last = max(each.began + each.seconds for each in taken)
        goodput = len(taken) / (last - began)
        told = sorted(each.seconds for each in refused)
        slowest = max(each.seconds for each in taken)
        print(f"peak {peak:.2f}/s, goodput {goodput:.2f}/s, {len(taken)} taken in {slowest:.1f} s")
        print(f"{len(refused)} refused in {told[len(told) // 2]:.3f} s, at most {told[-1]:.3f} s")
        assert len(refused) > 5 * len(taken)
        assert slowest < limit_s
        assert told[int(0.95 * len(told))] < 1
        assert goodput >= 0.9 * peak
        # The last ones that were refused were told how long the queue would take.
        late = [e for e in refused if e.began - began > 50]
        waits = sorted(
            (each.began + each.error["retry_after_s"] - began, last - began) for each in late
        )
        told_s, true_s = waits[len(waits) // 2]
        end_s = late[len(late) // 2].began - began
        print(f"told {told_s - end_s:.1f} s, true {true_s - end_s:.1f} s")
        assert (true_s - end_s) / 2 < told_s - end_s < 2 * (true_s - end_s)
        time.sleep(max(0.0, last + 5 - time.monotonic()))
        began = time.monotonic()
        after = Outcome(0, False, 0.0)
        with httpx.Client(timeout=60) as client:
            Load(command.url, BODIES, 0)._plain(client, after)
        assert after.is_whole
        assert time.monotonic() - began < 2 * calm_s + 0.5


def rate(load: Load, seconds: float) -> float:
    """Return how many requests a second are answered well for a while."""
    before = sum(each.status == 200 for each in load.outcomes)
    time.sleep(seconds)
    return (sum(each.status == 200 for each in load.outcomes) - before) / seconds


def test_a_burst_brings_replicas_and_lets_them_go(
    led_directory: Path, tmp_path: Path, expected: list[str]
) -> None:
    words = ["--min-replicas=1", "--max-replicas=2", "--target-wait-s=0.3", "--threads=1", *FLAGS]
    with served(tmp_path, led_directory, *words) as command:
        assert len(command.parts("Model")) == 1
        began = time.monotonic()
        with Load(command.url, BODIES, num_clients=40) as load:
            wait_until(lambda: len(command.parts("Model")) == 2, "no second replica", 90)
            print(f"second replica after {time.monotonic() - began:.1f} s")
            load.wait_for(200)
        began = time.monotonic()
        wait_until(lambda: len(command.parts("Model")) == 1, "the replica stays", 120)
        print(f"one replica again after {time.monotonic() - began:.1f} s")
        assert failures(load.outcomes, expected) == []
        assert all(each.is_whole for each in load.outcomes)


def test_soak(led_directory: Path, tmp_path: Path, expected: list[str]) -> None:
    """Half an hour (LONGHAUL_SOAK_S) of mixed load with people who leave and mistakes."""
    seconds = float(os.environ.get("LONGHAUL_SOAK_S", "1800"))
    bodies = [*BODIES, {"inputs": "long " * 6000}, {"inputs": ""}]
    with served(tmp_path, led_directory, "--min-replicas=1", *FLAGS) as command:
        samples: list[dict[str, Any]] = []
        is_over = threading.Event()

        def leave() -> None:
            # Streams that are left after their first line, and plain requests given up.
            body = BODIES[0] | {"stream": True}
            while not is_over.is_set():
                with httpx.Client(timeout=10) as client:
                    with client.stream("POST", command.url, json=body) as response:
                        next(response.iter_lines(), None)
                    with contextlib.suppress(httpx.TimeoutException):
                        client.post(command.url, json=BODIES[1], timeout=0.05)

        leaver = threading.Thread(target=leave)
        with Load(command.url, bodies, num_clients=6) as load:
            leaver.start()
            load.wait_for(200, 120)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                samples.append(measure(command))
                time.sleep(seconds / 20)
            is_over.set()
            leaver.join()
        good = [each for each in load.outcomes if each.place < len(BODIES)]
        assert failures(good, expected) == []
        assert all(each.status == 422 for each in load.outcomes if each.place >= len(BODIES))
        for kind in ("Model", "Gateway", "ProxyActor"):
            for what, slack in (("rss_mb", 40), ("threads", 4), ("fds", 12)):
                values = [sample[kind][what] for sample in samples]
                quarter = max(1, len(values) // 4)
                early = max(values[quarter : 2 * quarter])
                late = min(values[-quarter:])
                print(kind, what, values[0], early, late)
                assert late <= early + slack, f"{kind} {what} grows: {values}"
        wait_until(lambda: is_empty(command), "something is queued for nobody", 20)


def measure(command: Command) -> dict[str, Any]:
    """Memory, threads and open files of each kind of process."""
    return {
        kind: {
            "rss_mb": sum(p.memory_info().rss for p in command.parts(kind)) / 2**20,
            "threads": sum(p.num_threads() for p in command.parts(kind)),
            "fds": sum(p.num_fds() for p in command.parts(kind)),
        }
        for kind in ("Model", "Gateway", "ProxyActor")
    }


def is_empty(command: Command) -> bool:
    """Whether the metrics say that no token is queued."""
    text = httpx.get(f"{command.url}/metrics", timeout=20).text
    lines = [x for x in text.splitlines() if x.startswith("ray_longhaul_queued_tokens{")]
    return bool(lines) and all(float(line.rsplit(" ", 1)[1]) == 0 for line in lines)
