"""The scheduler alone: plain documents, no model, no thread, and a clock that the test sets."""

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.errors import CancelledError, ConfigError, DeadlineError
from longformer_core.scheduling.scheduler import Load, Scheduler

BYTES_PER_TOKEN, BYTES_HELD = 10, 3


@dataclass(eq=False)
class Paper:
    """A document: only what a scheduler looks at."""

    num_tokens: int
    num_rows: int = 1
    kind: Hashable = None
    deadline: float | None = None
    is_cancelled: bool = False
    is_bad: bool = False

    @property
    def deadline_s(self) -> float | None:
        return self.deadline


def num_bytes(pack: Sequence[Paper], running: Sequence[Paper]) -> int:
    """Encoding takes more than holding."""
    tokens = sum(paper.num_tokens for paper in pack)
    return tokens * BYTES_PER_TOKEN + BYTES_HELD * sum(p.num_tokens for p in (*pack, *running))


def scheduler(**budgets: Any) -> Scheduler[Any]:
    given = {"batch_tokens": 100, "max_rows": 8, "memory_bytes": 10**6} | budgets
    return Scheduler(num_bytes=num_bytes, **given)


def added(papers: Sequence[Paper], **budgets: Any) -> Scheduler[Any]:
    made = scheduler(**budgets)
    made.add(papers)
    return made


def finish_all(made: Scheduler[Any], pack: Sequence[Paper]) -> None:
    for paper in pack:
        made.finish(paper)


class TestBudgets:
    def test_a_pack_ends_at_each_budget_and_at_another_kind(self) -> None:
        papers = [Paper(40), Paper(40), Paper(40)]
        assert added(papers).next_pack() == papers[:2]
        assert added(papers, batch_tokens=1000, max_rows=1).next_pack() == papers[:1]
        per_paper = 40 * (BYTES_PER_TOKEN + BYTES_HELD)
        for count in (1, 2, 3):
            made = added(papers, batch_tokens=1000, memory_bytes=count * per_paper)
            assert made.next_pack() == papers[:count]
        mixed = [Paper(5), Paper(5, kind="beams"), Paper(5)]
        made = added(mixed)
        assert [made.next_pack() for _ in range(4)] == [[mixed[0]], [mixed[1]], [mixed[2]], []]

    def test_one_beyond_the_budgets_goes_alone(self) -> None:
        papers = [Paper(10), Paper(500, num_rows=20), Paper(10)]
        made = added(papers)
        for paper in papers:
            pack = made.next_pack()
            assert pack == [paper]
            assert made.next_pack() == []
            finish_all(made, pack)
        assert made.is_idle

    def test_rows_and_bytes_of_those_that_run_count(self) -> None:
        papers = [Paper(10, num_rows=3) for _ in range(4)]
        made = added(papers, max_rows=7)
        assert made.next_pack() == papers[:2]
        assert made.next_pack() == []
        made.finish(papers[0])
        assert made.next_pack() == papers[2:3]

    @pytest.mark.parametrize("name", ["batch_tokens", "max_rows", "memory_bytes"])
    def test_a_budget_below_one_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name} is 0; it must be 1 or greater"):
            scheduler(**{name: 0})

    def test_the_load_counts_all_there_is(self) -> None:
        papers = [Paper(60), Paper(70), Paper(5)]
        made = added(papers)
        assert made.load() == Load(3, 135, 0, 0)
        made.next_pack()
        assert made.load() == Load(2, 75, 1, 60)
        made.fail(papers[:1], is_out_of_memory=False)
        assert made.load() == Load(2, 75, 0, 0)
        assert set(made.clear()) == set(papers[1:])
        assert made.load() == Load(0, 0, 0, 0)
        assert made.is_idle


class TestFailures:
    def test_suspects_are_tried_in_halves_and_nobody_beside_them(self) -> None:
        papers = [Paper(1) for _ in range(5)]
        late = Paper(1)
        made = added(papers)
        assert made.next_pack() == papers
        assert made.fail(papers, is_out_of_memory=False) is None
        made.add([late])
        first = made.next_pack()
        assert first == papers[:2]
        assert made.next_pack() == []
        finish_all(made, first)
        assert made.next_pack() == papers[2:]
        assert made.next_pack() == []
        finish_all(made, papers[2:])
        assert made.next_pack() == [late]

    def test_who_has_a_result_already_did_not_fail(self) -> None:
        papers = [Paper(1) for _ in range(3)]
        made = added(papers)
        made.next_pack()
        made.finish(papers[0])
        assert made.fail(papers[:2], is_out_of_memory=False) is papers[1]
        assert made.fail(papers[:2], is_out_of_memory=False) is None
        assert made.load() == Load(0, 0, 1, 1)

    def test_memory_may_lack_because_of_others(self) -> None:
        papers = [Paper(60), Paper(60)]
        made = added(papers)
        made.next_pack()
        made.next_pack()
        assert made.fail(papers[1:], is_out_of_memory=True) is None
        assert made.next_pack() == []
        made.finish(papers[0])
        assert made.next_pack() == papers[1:]
        assert made.fail(papers[1:], is_out_of_memory=True) is papers[1]
        assert made.is_idle


class TestEnds:
    def test_nobody_is_looked_at_before_there_is_a_reason(self) -> None:
        paper = Paper(1, deadline=5.0)
        made = added([paper])
        paper.is_cancelled = True
        assert made.expire(4.0) == []
        made.note_cancel()
        ((found, error),) = made.expire(4.0)
        assert found is paper
        assert isinstance(error, CancelledError)

    def test_deadlines_in_turn(self) -> None:
        papers = [Paper(1, deadline=d) for d in (3.0, 1.0, 2.0)] + [Paper(1)]
        made = added(papers)
        assert made.expire(1.0) == []
        assert [paper for paper, _ in made.expire(1.5)] == [papers[1]]
        expired = made.expire(9.0)
        assert {paper for paper, _ in expired} == {papers[0], papers[2]}
        assert all(isinstance(error, DeadlineError) for _, error in expired)
        assert made.next_pack() == [papers[3]]


# A number, of which the story is made: drawn piece by piece, most would repeat one another.
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**9))
def test_every_document_leaves_once_and_the_budgets_hold(seed: int) -> None:
    """Documents come, fail, are cancelled and late at random, and the bad ones are found."""
    pick = random.Random(seed)
    batch_tokens, max_rows = pick.choice([30, 100, 1000]), pick.choice([1, 4, 16])
    memory_bytes = pick.choice([10**6, 600 * (BYTES_PER_TOKEN + BYTES_HELD), 500])
    made = scheduler(batch_tokens=batch_tokens, max_rows=max_rows, memory_bytes=memory_bytes)
    running: list[Paper] = []
    left: dict[Paper, str] = {}
    papers: list[Paper] = []

    def leave(paper: Paper, why: str) -> None:
        assert paper not in left
        left[paper] = why

    def come(count: int) -> None:
        new = [
            Paper(
                pick.randint(1, 60),
                pick.choice([1, 1, 2, 5]),
                pick.choice(["one", "two"]),
                deadline=None if pick.random() < 0.8 else pick.uniform(0, 40),
                is_bad=pick.random() < 0.15,
            )
            for _ in range(count)
        ]
        papers.extend(new)
        made.add(new)

    come(pick.randint(1, 12))
    now = 0.0
    while not made.is_idle:
        now += 1
        assert now < 2000
        if now < 20 and pick.random() < 0.3:
            come(pick.randint(1, 4))
        if papers and pick.random() < 0.1:
            pick.choice(papers).is_cancelled = True
            made.note_cancel()
        for paper, error in made.expire(now):
            leave(paper, type(error).__name__)
            running = [one for one in running if one is not paper]
        pack = made.next_pack()
        beside, running = running, running + pack
        check_budgets(pack, beside, batch_tokens, max_rows, memory_bytes)
        load = made.load()
        assert load.running_documents == len(running)
        assert load.waiting_documents == len(papers) - len(left) - len(running)
        group = [one for one in running if pick.random() < 0.7]
        if any(paper.is_bad for paper in group):
            alone = made.fail(group, is_out_of_memory=pick.random() < 0.3)
            running = [one for one in running if one not in group]
            if alone is not None:
                leave(alone, "failed")
        else:
            finish_all(made, group)
            for paper in group:
                leave(paper, "done")
            running = [one for one in running if one not in group]
    assert set(left) == set(papers)
    for paper, why in left.items():
        assert why in {"done", "failed", "CancelledError", "DeadlineError"}
        assert (why == "failed") <= paper.is_bad
        assert (why == "done") <= (not paper.is_bad)
        assert (why == "CancelledError") <= paper.is_cancelled
        assert (why == "DeadlineError") <= ((paper.deadline or math.inf) < now)


def check_budgets(
    pack: list[Paper], beside: list[Paper], batch_tokens: int, max_rows: int, memory_bytes: int
) -> None:
    if len(pack) > 1:
        assert sum(paper.num_tokens for paper in pack) <= batch_tokens
        assert len({paper.kind for paper in pack}) == 1
    if pack and len(pack) + len(beside) > 1:
        assert sum(paper.num_rows for paper in (*pack, *beside)) <= max_rows
        assert num_bytes(pack, beside) <= memory_bytes
