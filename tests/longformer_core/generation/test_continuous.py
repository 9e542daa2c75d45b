"""Documents that come and go while others decode: each one's text is its own alone."""

import functools
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longformer_core.attention.global_attention import Form
from longformer_core.errors import (
    CancelledError,
    DeadlineError,
    NonFiniteError,
    OutOfMemoryError,
    ShapeError,
)
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.engine import Engine
from longformer_core.generation.request import GenerationHandle, Request
from longformer_core.generation.running_batch import RunningBatch
from longformer_core.scheduling.scheduler import Load
from tests.longformer_core.generation.helpers import Watched, documents, models, wait_until, watch
from tests.longformer_core.generation.scenes import (
    BEAMS,
    GREEDY,
    LONG,
    LONG_BEAMS,
    MIXED,
    NAN_TOKEN,
    NUM_TEXTS,
    PATIENCE_S,
    POISON_TOKEN,
    TEXTS,
    Listener,
    alone,
    alone_text,
    at_step,
    fragile,
    give,
    hold_at,
    no_engine_thread,
    raiser,
    request_of,
    texts_of,
)


@dataclass
class Item:
    """A document of a drawn story: what it is, when it comes, and what happens to it."""

    text: int
    option: int
    fate: str
    come: int
    cancel: int
    listen: int | None
    handle: GenerationHandle = field(init=False)
    listener: Listener | None = None

    @property
    def request(self) -> Request:
        bad = {"nan": NAN_TOKEN, "poison": POISON_TOKEN}.get(self.fate)
        return request_of(self.text, self.option, bad)

    def start(self, engine: Engine) -> None:
        deadline_s = {"late": 0.0, "in a hurry": 0.01}.get(self.fate)
        self.handle = give(engine, self.request, deadline_s)

    def hear(self) -> None:
        self.listener = Listener(self.handle)

    def check(self) -> bool:
        """Compare with the document alone; return whether it failed without a reason."""
        outcome = self.handle.result(PATIENCE_S)
        if self.listener is not None:
            self.listener.join(PATIENCE_S)
            assert self.listener.last is outcome
        if outcome.error is not None:
            assert outcome.sequences == []
            expected = {
                "nan": NonFiniteError,
                "cancel": CancelledError,
                "late": DeadlineError,
                "in a hurry": DeadlineError,
            }.get(self.fate)
            if expected is not None and isinstance(outcome.error, expected):
                return False
            return not (self.fate == "poison" and "KeyError" in str(outcome.error))
        assert self.fate not in ("nan", "poison", "late")
        expected = alone(self.text, self.option)
        assert outcome.sequences == expected.sequences
        assert outcome.scores == pytest.approx(expected.scores, abs=1e-4)
        if self.listener is not None:
            assert self.listener.ids == outcome.sequences[0]
        return False


class Story:
    """Do what is due before each step of the model, and the rest when it has nothing to do."""

    def __init__(
        self, model: Watched, engine: Engine, items: list[Item], accidents: dict[int, Exception]
    ) -> None:
        due: list[tuple[int, Callable[[], None]]] = []
        for item in items:
            due.append((item.come, functools.partial(item.start, engine)))
            if item.listen is not None:
                due.append((item.come + item.listen, item.hear))
            if item.fate == "cancel":
                due.append((item.come + item.cancel, lambda item=item: item.handle.cancel()))
        # Stable, so that nothing happens to a document before it has come.
        self._due = deque(sorted(due, key=lambda pair: pair[0]))
        self._model, self._engine, self._items = model, engine, items
        self._accidents = accidents
        # The engine decodes a document before `add` has returned its handle.
        self._acting = threading.Lock()
        self.num_accidents = 0
        self.plans: list[int] = []
        model.before_step.append(self._before_step)

    def play(self) -> None:
        while self._due:
            with self._acting:
                if self._due:
                    self._due.popleft()[1]()
            self._wait()

    def _wait(self) -> None:
        for item in self._items:
            if hasattr(item, "handle"):
                item.handle.result(PATIENCE_S)

    def _before_step(self) -> None:
        self.plans.append(planned(self._engine))
        step = len(self._model.rows)
        with self._acting:
            while self._due and self._due[0][0] <= step:
                self._due.popleft()[1]()
        if step in self._accidents:
            self.num_accidents += 1
            raise self._accidents[step]


def planned(engine: Engine) -> int:
    """What the engine reckons that those that decode take."""
    return engine._budget.held_bytes(
        [handle.request for batch in engine._batches for handle in batch.handles]
    )


def random_item(pick: random.Random, options: list[int]) -> Item:
    fates = ["cancel", "late", "in a hurry", "nan", "poison"]
    return Item(
        text=pick.randrange(NUM_TEXTS),
        option=pick.choice(options),
        fate=pick.choice(fates) if pick.random() < 0.3 else "good",
        come=pick.randrange(12),
        cancel=pick.randrange(12),
        listen=pick.choice([None, None, 0, 3, 50]),
    )


def random_accidents(pick: random.Random) -> dict[int, Exception]:
    errors = [RuntimeError("odd"), MemoryError("full"), torch.OutOfMemoryError("full")]
    return {pick.randint(1, 40): pick.choice(errors) for _ in range(pick.choice([0, 0, 1, 2]))}


# A number, of which the story is made: drawn piece by piece, most would repeat one another.
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**9))
def test_whatever_happens_to_others_a_documents_text_is_its_own(seed: int) -> None:
    pick = random.Random(seed)
    # Few kinds of options, so that some documents share theirs and some only the step.
    rows = pick.choice([[0, 4, 7], [2, 3, 6], [1, 5], range(len(MIXED))])
    options = pick.sample(rows, k=min(len(rows), 3))
    items = [random_item(pick, options) for _ in range(pick.randint(3, 16))]
    model = Watched(fragile())
    model.poison[POISON_TOKEN] = KeyError("bad luck")
    model.max_rows = pick.choice([10**9, 10**9, 8, 4])
    form: Form = pick.choice(["auto", "absorbed", "projected"])
    probe = Engine(fragile(), memory_bytes=2**40, form=form)
    largest = max(probe._budget.num_bytes([item.request]) for item in items)
    batch_tokens = pick.choice([10_000, 10_000, 60, 1])
    engine = Engine(
        model,
        batch_tokens=batch_tokens,
        max_rows=pick.choice([256, 256, 256, 6, 1]),
        memory_bytes=int(largest * pick.choice([1000.0, 1000.0, 2.5, 1.0])),
        form=form,
    )
    story = Story(model, engine, items, random_accidents(pick))

    story.play()

    num_unexplained = sum(item.check() for item in items)
    # What fails while a document decodes alone is that document's error.
    assert num_unexplained <= story.num_accidents
    assert max(story.plans, default=0) <= engine._budget.memory_bytes
    assert all(len(pack) == 1 or sum(map(len, pack)) <= batch_tokens for pack in model.encoded)
    wait_until(no_engine_thread)
    assert engine.load() == Load(0, 0, 0, 0)
    assert engine._batches == []


class TestMemory:
    def test_what_does_not_fit_alone_is_refused_before_any_work(self) -> None:
        model = watch(3)
        small, large = Request(TEXTS[0], GREEDY), Request(TEXTS[5], BEAMS)
        needed = Engine(model)._budget.num_bytes([large])
        engine = Engine(model, memory_bytes=needed - 1)
        outcomes = dict(engine.run([small, large]))
        assert outcomes[0].error is None
        error = outcomes[1].error
        assert isinstance(error, OutOfMemoryError)
        assert f"needs about {needed / 1e9:.3g} GB" in str(error)
        assert f"of {(needed - 1) / 1e9:.3g} GB" in str(error)
        assert model.encoded == [[TEXTS[0]]]
        assert dict(Engine(model, memory_bytes=needed).run([large]))[0].error is None

    def test_documents_wait_until_there_is_memory(self) -> None:
        model = watch(3)
        texts = documents(1, *[40] * 10)
        probe = Engine(model)
        three = probe._budget.num_bytes([Request(text, LONG) for text in texts[:3]])
        engine = Engine(model, memory_bytes=three)
        plans: list[int] = []
        model.before_step.append(lambda: plans.append(planned(engine)))

        outcomes = dict(engine.run([Request(text, LONG) for text in texts]))

        assert all(outcome.error is None for outcome in outcomes.values())
        # Three can be encoded at once; a few more are held in the room that this took.
        assert 3 <= max(model.rows) <= 5
        assert max(plans) <= three
        assert sum(model.rows) == 10 * 38

    def test_the_budget_covers_what_is_held(self) -> None:
        """Up to the room that is kept for documents to come: a factor of two."""
        model = watch(3)
        engine = Engine(model)
        shares: list[float] = []

        def compare() -> None:
            shares.append(sum(map(held_bytes, engine._batches)) / planned(engine))

        model.before_step.append(compare)
        options = [GenerationConfig(max_new_tokens=4), LONG, LONG_BEAMS, BEAMS]
        requests = [
            Request(text, options[i % 4]) for i, text in enumerate(documents(1, *[90, 5, 40] * 10))
        ]
        assert all(outcome.error is None for _, outcome in engine.run(requests))
        assert 0.2 < max(shares) < 2

    def test_no_room_to_encode_beside_others_disturbs_nobody(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        model.max_tokens = 100
        others = documents(5, *[40] * 4)
        handles = [engine.add(text, GREEDY) for text in others]
        go_on.set()
        texts = texts_of([first, *handles])
        assert sum(pack.count(TEXTS[0]) for pack in model.encoded) == 1
        assert [len(pack) for pack in model.encoded] == [1, 4, 2, 2]
        assert texts[0] == texts_of([Engine(models(3)[0]).add(TEXTS[0], LONG)])[0]
        model = watch(3)
        assert texts[1:] == [texts_of([Engine(model).add(text, GREEDY)])[0] for text in others]

    def test_those_that_are_tried_again_keep_to_the_budget(self) -> None:
        """They came in packs of one, and their batch of four fails."""
        model = watch(3)
        at_step(model, 8, raiser(RuntimeError("odd")))
        texts = documents(5, *[40] * 4)
        outcomes = dict(Engine(model, batch_tokens=45).run([Request(text, LONG) for text in texts]))
        assert all(outcome.error is None for outcome in outcomes.values())
        assert [len(pack) for pack in model.encoded] == [1] * 8

    def test_one_that_lacks_memory_beside_others_is_tried_alone(self) -> None:
        model = watch(3)
        is_there, go_on = hold_at(model, 3)
        engine = Engine(model)
        first = engine.add(TEXTS[0], LONG)
        assert is_there.wait(PATIENCE_S)
        model.max_tokens = 10
        second = engine.add(TEXTS[5], GREEDY)
        at_step(model, 20, lambda: setattr(model, "max_tokens", 1000))
        go_on.set()
        assert texts_of([second]) == [alone_text(5)]
        assert first.is_done
        assert len(model.encoded) == 3


def held_bytes(batch: RunningBatch) -> int:
    """What sources and cache of a batch really take."""
    tensors = [tensor for group in batch._source._groups for tensor in group.held.tensors]
    return sum(t.untyped_storage().nbytes() for t in tensors) + batch._cache.num_bytes


class TestOptions:
    def test_documents_of_different_options_step_together(self) -> None:
        model = Watched(fragile())
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        chosen, starts = [(3, 0), (5, 7), (9, 4), (10, 0)], [1, 2, 2, 4]
        handles = [give(engine, request_of(*chosen[0]))]
        assert is_there.wait(PATIENCE_S)
        handles += [give(engine, request_of(*pair)) for pair in chosen[1:3]]
        at_step(model, 3, lambda: handles.append(give(engine, request_of(*chosen[3]))))
        go_on.set()

        texts = [texts_of([handle])[0] for handle in handles]

        assert texts == [alone(*pair).sequences for pair in chosen]
        ends = [start + len(rows[0]) for start, rows in zip(starts, texts, strict=True)]
        assert model.rows == [
            sum(start <= step < end for start, end in zip(starts, ends, strict=True))
            for step in range(1, max(ends))
        ]
        assert model.rows[3] == 4

    def test_equally_many_rows_step_together_and_others_in_turn(self) -> None:
        """Two beams beside two samples, and four beams in a step of their own."""
        model = Watched(fragile())
        is_there, go_on = hold_at(model, 1)
        engine = Engine(model)
        chosen = [(0, 2), (5, 3), (9, 6), (10, 1), (11, 5)]
        handles = [give(engine, request_of(*chosen[0]))]
        assert is_there.wait(PATIENCE_S)
        handles += [give(engine, request_of(*pair)) for pair in chosen[1:]]
        go_on.set()
        assert texts_of(handles) == [alone(*pair).sequences for pair in chosen]
        # A pack has equally many rows: the four beams are admitted one step later.
        assert model.rows[:4] == [2, 6, 6, 8]

    def test_ids_that_are_none_are_an_error_of_their_document(self) -> None:
        engine = Engine(models(3)[0])
        bad: list[Any] = [["a", "b"], [0, None, 2], [0.5, 2.0], [[0, 5, 2]]]
        requests = [Request(ids, GREEDY) for ids in (*bad, TEXTS[0])]
        outcomes = dict(engine.run(requests))
        assert [type(outcomes[i].error) for i in range(4)] == [ShapeError] * 4
        assert outcomes[4].sequences == alone_text(0)
