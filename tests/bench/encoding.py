"""The engine for encoders against the bare packed forward, and against transformers, padded.

    python -m tests.bench.encoding [overhead] [embed] [classify] [--documents 256] [--rounds 3]
        [--threads 2] [--device cpu|cuda] [--dtype float32|bfloat16] [--batch-sizes 1 2 4 8]
        [--model base|tiny]

`overhead`: documents of 33 to 4,096 tokens through the engine, and the same packs through the
model's own methods with everything at hand: the share of the bare speed that the engine keeps.
`embed` and `classify`: mean states, and logits, of so many real texts cut at 4,096 tokens
(`proposals` and `scitldr_abstract` where LONGHAUL_TEST_DATA has them), half of each, the first
token global. transformers takes them sorted by length in padded batches, at the batch size that was
fastest on a sample. Outputs are compared first, on that sample; then both take turns, and the
medians of documents per second are compared. Weights are untrained, of Longformer-base's size.
"""

import argparse
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from longformer_core import (
    EncodingEngine,
    EncodingRequest,
    LongformerConfig,
    LongformerForSequenceClassification,
    LongformerModel,
)
from longformer_core.layout import Layout
from longformer_core.tokenization.tokenizer import LEDTokenizerFast
from tests.bench.measure import alternate, device_name, distance, emit, fits, waited_for
from tests.helpers import LONGFORMER_BASE, corpus_texts, data_folder, tokenizer_directory

MAX_TOKENS, BATCH_TOKENS = 4096, {"cpu": 8192, "cuda": 131072}
GOALS = {"overhead": 0.95, "embed": 5.0, "classify": 5.0}
BATCH_SIZES = {"cpu": [1, 2, 4, 8], "cuda": [1, 4, 16, 64]}
# `tiny` says nothing of speed: it shows in seconds that the benchmark runs.
SIZES: dict[str, dict[str, Any]] = {
    "base": LONGFORMER_BASE,
    "tiny": LONGFORMER_BASE
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "attention_window": [64] * 2,
    },
}
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


def real_documents(count: int) -> list[list[int]]:
    """Token ids of real texts, half of them long and half of them short."""
    data, texts = data_folder(), list[str]()
    if data is not None and (data / "proposals").is_dir():
        import pyarrow.parquet as pq

        for folder, share in (("proposals", count - count // 2), ("scitldr_abstract", count // 2)):
            own: list[str] = []
            for file in sorted((data / folder).glob("*.parquet")):
                own += pq.read_table(file, columns=["text"])["text"].to_pylist()
            texts += own[:share]
    else:
        texts = corpus_texts(count)
    tokenizer = LEDTokenizerFast.from_pretrained(tokenizer_directory())
    rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [list(row) for row in rows]


def models(case: str, given: argparse.Namespace) -> tuple[Any, Any]:
    """The published model and ours, with the same weights."""
    torch.manual_seed(0)
    sizes = SIZES[given.model] | {"initializer_range": 0.05}
    name = "LongformerForSequenceClassification" if case == "classify" else "LongformerModel"
    ours_of = LongformerForSequenceClassification if case == "classify" else LongformerModel
    theirs = getattr(transformers, name)(transformers.LongformerConfig(**sizes)).eval()
    ours = ours_of(LongformerConfig(**sizes)).eval()
    ours.load_state_dict(theirs.state_dict())
    dtype = getattr(torch, given.dtype)
    return theirs.to(given.device, dtype), ours.to(given.device, dtype)


def engine_run(case: str, engine: EncodingEngine, texts: Sequence[list[int]]) -> list[Tensor]:
    want: Any = ["mean"] if case == "embed" else []
    outcomes = dict(engine.run([EncodingRequest(text, [0], want=want) for text in texts]))
    found = [outcomes[i].mean if case == "embed" else outcomes[i].logits for i in range(len(texts))]
    assert all(values is not None for values in found), outcomes
    return [values for values in found if values is not None]


@torch.no_grad()
def padded_run(
    case: str, model: Any, texts: Sequence[list[int]], batch_size: int, device: str
) -> list[Tensor]:
    """The published call on padded batches of documents of similar length."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found: dict[int, Tensor] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids = torch.ones(len(batch), len(texts[batch[0]]), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(texts[i])] = torch.tensor(texts[i])
        mask, marks = ids.ne(1).long(), torch.zeros_like(ids)
        marks[:, 0] = 1
        output = model(ids.to(device), mask.to(device), marks.to(device))
        if case == "embed":
            states = output.last_hidden_state.float()
            rows = [s[1 : len(texts[i]) - 1].mean(0) for s, i in zip(states, batch, strict=True)]
        else:
            rows = list(output.logits.float())
        found |= dict(zip(batch, (row.cpu() for row in rows), strict=True))
    return [found[i] for i in range(len(texts))]


def bench_real(case: str, given: argparse.Namespace) -> None:
    texts = real_documents(given.documents)
    theirs, ours = models(case, given)
    engine = EncodingEngine(ours, batch_tokens=BATCH_TOKENS[given.device])
    sample = texts[:: max(1, len(texts) // max(given.batch_sizes))]
    expected = padded_run(case, theirs, sample, 1, given.device)
    error = distance(torch.stack(engine_run(case, engine, sample)), torch.stack(expected))
    spread = distance(torch.stack(expected[:-1]), torch.stack(expected[1:]))
    limit = LIMITS[given.dtype]
    assert error < limit < spread, f"outputs differ by {error}, documents by {spread}: no speed"

    def their_run(size: int, documents: Sequence[list[int]]) -> Callable[[], Any]:
        run = functools.partial(padded_run, case, theirs, documents, size, given.device)
        return waited_for(run, given.device)

    tried = {size: their_run(size, sample) for size in given.batch_sizes}
    tried = {size: run for size, run in tried.items() if fits(run)}
    seconds = alternate({str(size): run for size, run in tried.items()}, 1, warm_up=0)
    best = int(min(seconds, key=lambda size: seconds[size]))
    calls = {
        "transformers": their_run(best, texts),
        "ours": waited_for(lambda: engine_run(case, engine, texts), given.device),
    }
    times = alternate(calls, given.rounds, warm_up=0)
    emit(
        "encoding",
        case,
        model=given.model,
        device=device_name(given.device),
        dtype=given.dtype,
        documents=len(texts),
        mean_tokens=sum(map(len, texts)) / len(texts),
        rounds=given.rounds,
        difference=error,
        difference_between_documents=spread,
        transformers_batch_size=best,
        documents_per_s=len(texts) / times["ours"],
        transformers_documents_per_s=len(texts) / times["transformers"],
        transformers_over_ours=times["transformers"] / times["ours"],
        goal=GOALS[case],
    )


def bench_overhead(given: argparse.Namespace) -> None:
    _, ours = models("classify", given)
    pick = random.Random(0)
    lengths = sorted([33, MAX_TOKENS, *(pick.randint(33, MAX_TOKENS) for _ in range(14))])[::-1]
    texts = [[0, *pick.choices(range(4, 50000), k=n - 2), 2] for n in lengths]
    budget = BATCH_TOKENS[given.device]
    packs: list[list[list[int]]] = [[]]
    for text in texts:
        if packs[-1] and sum(map(len, packs[-1])) + len(text) > budget:
            packs.append([])
        packs[-1].append(text)
    device = given.device
    ready = []
    for pack in packs:
        ids = torch.tensor([token for text in pack for token in text], device=device)
        layout = Layout.from_lengths(list(map(len, pack)), [[0]] * len(pack), device=device)
        ready.append((ids, layout))

    @torch.inference_mode()
    def bare() -> Tensor:
        logits = []
        for ids, layout in ready:
            firsts = ours.encode(ids, layout)[layout.offsets[:-1].long()]
            logits.append(ours.head_logits(firsts).float().cpu())
        return torch.cat(logits)

    engine = EncodingEngine(ours, batch_tokens=budget)
    error = distance(torch.stack(engine_run("classify", engine, texts)), bare())
    assert error < LIMITS[given.dtype], f"the outputs differ by {error}: no speed is printed"
    calls = {"bare": bare, "engine": lambda: engine_run("classify", engine, texts)}
    times = alternate(calls, given.rounds)
    emit(
        "encoding",
        "overhead",
        model=given.model,
        device=device_name(given.device),
        dtype=given.dtype,
        lengths=lengths,
        packs=len(packs),
        rounds=given.rounds,
        difference=error,
        bare_over_engine=times["bare"] / times["engine"],
        goal=GOALS["overhead"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=list(BATCH_SIZES), default="cpu")
    parser.add_argument("--dtype", choices=list(LIMITS), default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+")
    parser.add_argument("--model", choices=list(SIZES), default="base")
    given = parser.parse_args()
    unknown = set(given.cases) - set(GOALS)
    if unknown:
        parser.error(f"unknown: {unknown}")
    given.batch_sizes = given.batch_sizes or BATCH_SIZES[given.device]
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    for case in given.cases or GOALS:
        if case == "overhead":
            bench_overhead(given)
        else:
            bench_real(case, given)


if __name__ == "__main__":
    main()
