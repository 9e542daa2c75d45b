"""The ledger: what is done, which block lost its worker, and when to stop."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipelines.batch.ledger import BlockAssignment, Ledger, Tally


def failures(n: int, rows: int = 10) -> Tally:
    return Tally(rows=rows, errors=Counter({"NullText": n} if n else {}))


def test_a_block_without_accidents() -> None:
    ledger = Ledger(max_failed=5, failed_before=0)
    assert ledger.begin("a", "w") == BlockAssignment()
    ledger.finish("a", Tally(rows=8, tokens_in=80, tokens_out=9), {})
    snapshot = ledger.snapshot()
    assert (snapshot.done.rows, snapshot.done.tokens_in, snapshot.done.tokens_out) == (8, 80, 9)
    assert (snapshot.num_begun, snapshot.num_deaths, snapshot.over_budget) == (1, 0, False)


def test_a_block_that_lost_its_worker_is_run_one_by_one() -> None:
    ledger = Ledger(5, 0)
    ledger.begin("a", "first")
    ledger.begin("b", "another")
    # Nobody is guilty yet: all of the block's documents were in the worker together.
    assert ledger.begin("a", "second") == BlockAssignment(one_by_one=True)
    assert ledger.begin("c", "second") == BlockAssignment()
    assert ledger.snapshot().num_deaths == 1


def test_a_block_that_begins_again_in_a_living_worker_lost_nothing() -> None:
    ledger = Ledger(5, 0)
    ledger.begin("a", "w")
    assert ledger.begin("a", "w") == BlockAssignment()
    assert ledger.snapshot().num_deaths == 0


def test_a_document_that_was_alone_is_given_up() -> None:
    ledger = Ledger(5, 0)
    ledger.begin("a", "1")
    ledger.begin("a", "2")
    ledger.alone("a", "good")
    ledger.alone("a", "bad")
    assert ledger.begin("a", "3") == BlockAssignment(one_by_one=True, given_up=frozenset({"bad"}))
    # Before the first document is alone again, a death is nobody's fault.
    assert ledger.begin("a", "4").given_up == {"bad"}
    ledger.alone("a", "worse")
    assert ledger.begin("a", "5").given_up == {"bad", "worse"}
    assert ledger.snapshot().num_deaths == 4
    ledger.finish("a", failures(2), {})
    # The same ids once more (their node was lost after they were done): no death.
    assert ledger.begin("a", "6").given_up == {"bad", "worse"}
    assert ledger.snapshot().num_deaths == 4


def test_one_death_can_hit_many_blocks_and_is_one_documents_fault() -> None:
    ledger = Ledger(5, 0)
    for block in ("a", "b"):
        ledger.begin(block, "1")
    for block in ("a", "b"):
        assert ledger.begin(block, "2") == BlockAssignment(one_by_one=True)
    assert ledger.snapshot().num_deaths == 1
    # One block has the worker for itself while the other waits for it.
    ledger.alone("a", "bad")
    assert ledger.begin("b", "3") == BlockAssignment(one_by_one=True)
    assert ledger.begin("a", "3").given_up == {"bad"}
    assert ledger.snapshot().num_deaths == 2
    # What is done cannot be blamed for a document of the other that is alone after it.
    ledger.alone("a", "last")
    ledger.finish("a", failures(1), {})
    ledger.alone("b", "worse")
    assert ledger.begin("a", "4").given_up == {"bad"}
    assert ledger.begin("b", "4").given_up == {"worse"}
    assert ledger.snapshot().num_deaths == 3


def test_blocks_do_not_share_their_dead() -> None:
    ledger = Ledger(5, 0)
    for block, worker in (("a", "1"), ("b", "2")):
        ledger.begin(block, worker)
        ledger.begin(block, f"{worker}, again")
    ledger.alone("a", "x")
    ledger.alone("b", "y")
    assert ledger.begin("a", "5").given_up == {"x"}
    assert ledger.begin("b", "6").given_up == {"y"}


def test_a_block_done_twice_counts_once() -> None:
    ledger = Ledger(5, 0)
    for _ in range(2):
        ledger.begin("a", "w")
        ledger.finish("a", failures(3), {"NullText": "the text is null"})
    snapshot = ledger.snapshot()
    assert (snapshot.done.rows, snapshot.done.failed) == (10, 3)
    assert not snapshot.over_budget


def test_the_budget_counts_rows_of_earlier_attempts() -> None:
    ledger = Ledger(max_failed=5, failed_before=3)
    ledger.begin("a", "w")
    ledger.finish("a", failures(2), {})
    assert not ledger.snapshot().over_budget, "as many as allowed are allowed"
    assert not ledger.begin("b", "w").stop
    ledger.finish("b", failures(1), {})
    assert ledger.snapshot().over_budget
    assert ledger.begin("c", "w") == BlockAssignment(stop=True)
    assert ledger.snapshot().num_begun == 2


def test_a_budget_of_nothing() -> None:
    ledger = Ledger(0, 0)
    ledger.begin("a", "w")
    ledger.finish("a", failures(0), {})
    assert not ledger.begin("b", "w").stop
    ledger.finish("b", failures(1), {})
    assert ledger.begin("c", "w").stop


def test_one_sample_of_every_kind_is_kept() -> None:
    ledger = Ledger(9, 0)
    ledger.finish("a", failures(1), {"NullText": "first"})
    ledger.finish("b", failures(1), {"NullText": "second", "NonFinite": "NaN"})
    assert ledger.snapshot().samples == {"NullText": "first", "NonFinite": "NaN"}


def test_everything_that_happens_moves_the_ledger() -> None:
    ledger = Ledger(5, 0)
    seen = [ledger.snapshot().moved]
    for step in (
        lambda: ledger.loading("w", object()),
        lambda: ledger.loaded("w"),
        lambda: ledger.begin("a", "w"),
        lambda: ledger.alone("a", "x"),
        lambda: ledger.moved(),
        lambda: ledger.finish("a", Tally(), {}),
    ):
        step()
        seen.append(ledger.snapshot().moved)
    assert len(set(seen)) == len(seen)
    assert ledger.snapshot().moved == seen[-1], "looking is no move"


def test_loading_is_told() -> None:
    ledger = Ledger(5, 0)
    handles = [object(), object()]
    ledger.loading("w", handles[0])
    ledger.loading("v", handles[1])
    assert ledger.workers() == handles
    assert ledger.snapshot().num_loading == 2
    ledger.loaded("w")
    ledger.loaded("never heard of")
    snapshot = ledger.snapshot()
    assert snapshot.num_loading == 1
    assert 0 <= snapshot.load_s < 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 3)), max_size=30))
def test_totals_of_any_order(blocks: list[tuple[int, int, int]]) -> None:
    ledger = Ledger(10**6, 0)
    first: dict[int, tuple[int, int]] = {}
    for block, rows, failed in blocks:
        ledger.begin(str(block), "w")
        ledger.finish(str(block), failures(failed, rows), {})
        first.setdefault(block, (rows, failed))
    done = ledger.snapshot().done
    assert done.rows == sum(rows for rows, _ in first.values())
    assert done.failed == sum(failed for _, failed in first.values())
    assert ledger.snapshot().num_deaths == 0


def test_tallies_add_up() -> None:
    one = Tally(1, 2, 3, Counter({"NullText": 1}))
    two = Tally(10, 20, 30, Counter({"NullText": 1, "NonFinite": 2}))
    assert one + two == Tally(11, 22, 33, Counter({"NullText": 2, "NonFinite": 2}))
    assert (one + two).failed == 4
    assert one + Tally() == one
