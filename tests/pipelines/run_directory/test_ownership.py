"""One process at a time owns a run directory."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.errors import Refused
from pipelines.run_directory.ownership import Ownership
from pipelines.storage import Location
from tests.pipelines.owners import other_owner, owner_file

ROOT = Path(__file__).resolve().parents[3]


def test_a_living_owner_keeps_the_directory(place: Location, quick: None) -> None:
    first = Ownership(place)
    first.claim()
    assert list(json.loads(owner_file(place).read_text())) == [
        "owner_id",
        "host",
        "pid",
        "process_birth",
        "heartbeat",
    ]
    with pytest.raises(Refused, match=rf"process {os.getpid()} on .* is working on this run"):
        Ownership(place).claim()
    assert first.beat()
    first.release()
    assert not owner_file(place).exists()
    Ownership(place).claim()


def test_a_process_that_is_gone_is_followed_at_once(place: Location, quick: None) -> None:
    script = (
        "import sys; from pipelines.run_directory.ownership import Ownership\n"
        "from pipelines.storage import locate\n"
        "Ownership(locate(sys.argv[1])).claim(); print('claimed', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, place.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(Refused, match=f"process {holder.pid} on"):
            Ownership(place).claim()
        holder.kill()
        # Nobody has waited for it yet: it is a zombie, which writes nothing any more.
        deadline = time.monotonic() + 30
        while Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        Ownership(place).claim()
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    told = json.loads(owner_file(place).read_text())
    assert told["pid"] == os.getpid()


def test_a_number_taken_over_by_another_process_is_not_the_owner(
    place: Location, quick: None
) -> None:
    mine = Ownership(place)
    mine.claim()
    me = json.loads(owner_file(place).read_text())
    other_owner(place, host=me["host"], pid=me["pid"], process_birth="12345")
    Ownership(place).claim()
    other_owner(place, host=me["host"], pid=me["pid"], process_birth=me["process_birth"])
    with pytest.raises(Refused):
        Ownership(place).claim()


def test_another_host_is_believed_for_a_minute(place: Location, quick: None) -> None:
    other_owner(place, heartbeat=time.time() - 55)
    with pytest.raises(Refused, match="process 1 on elsewhere/1"):
        Ownership(place).claim()
    # Its clock may go ahead of ours.
    other_owner(place, heartbeat=time.time() + 30)
    with pytest.raises(Refused):
        Ownership(place).claim()
    other_owner(place, heartbeat=time.time() - 61)
    Ownership(place).claim()


def test_who_reads_another_name_stops(place: Location, quick: None) -> None:
    mine = Ownership(place)
    mine.claim()
    other = other_owner(place)
    assert not mine.beat()
    mine.release()
    assert json.loads(owner_file(place).read_text()) == other.model_dump()


def test_a_heartbeat_moves(place: Location, quick: None) -> None:
    mine = Ownership(place)
    mine.claim()
    before = json.loads(owner_file(place).read_text())["heartbeat"]
    time.sleep(0.01)
    assert mine.beat()
    assert json.loads(owner_file(place).read_text())["heartbeat"] > before


def test_an_unreadable_owner_is_none(place: Location, quick: None) -> None:
    place.join("_owner.json").write_bytes(b'{"owner_id": ')
    Ownership(place).claim()


def test_of_many_that_claim_at_once_one_wins_at_most(place: Location) -> None:
    barrier = threading.Barrier(6)
    outcomes: list[str] = []

    def claim() -> None:
        barrier.wait()
        try:
            Ownership(place).claim()
            outcomes.append("won")
        except Refused:
            outcomes.append("refused")

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 6
    assert outcomes.count("won") == 1, outcomes
