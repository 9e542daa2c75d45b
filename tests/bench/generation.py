"""The generation engine against transformers' `generate`, at LED's published sizes, untrained.

    python -m tests.bench.generation [1k-greedy 1k-beams 4k-greedy ... mixed] [--rounds 3]
        [--threads 2] [--new-tokens 96] [--mixed 32] [--model base|large|tiny]
        [--device cpu|cuda] [--dtype float32 bfloat16] [--no-cuda-graphs]

One document of 1k, 4k and 16k tokens, greedy (96 new tokens) and with 4 beams (24); `mixed` is 32
documents of 200 to 8,000 tokens, each with its own number of new tokens from 10 to 128;
`16k-beams-16` (on the CPU only when asked for) is 16 documents with 256. Outputs have the length
they were asked to have, on both sides. They are compared first: in float32 tokens are equal, or
scores where two sequences are equally good; in bfloat16 the agreement is printed instead.

transformers runs as it ships, documents sorted by length and padded, at the batch size that was
fastest on a sample of them. On the CPU ours in bfloat16 runs against both dtypes of theirs, one
line each, and has to meet the goals in both. All take turns in one process. `first` is the ratio of
the times to the first logits, encoding and the source's keys and values included; `per_token` that
of the time after it, and `whole` that of all time. With few new tokens the engine reads the
source's states themselves: its steps are dearer then, its first token is cheaper, and `whole` alone
is fair. The bytes of a step are the fewest that have to be read: the weights once, the source as
states or as keys and values, and the tokens written.
"""

import argparse
import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from longformer_core import LEDConfig, LEDForConditionalGeneration
from longformer_core.generation.config import GenerationConfig
from longformer_core.generation.request import Generation
from tests.bench.contestants import (
    GEOMETRIES,
    Work,
    compare,
    engine_run,
    generate_run,
    generate_scored,
)
from tests.bench.measure import alternate, cuda_bytes_per_s, device_name, emit, peak_bytes_on

BEAMS = 4
# So many that keys and values are worth making, as in a text of common length.
NEW_TOKENS = {"greedy": 96, "beams": 24}
SIZES = {"1k": 1024, "4k": 4096, "16k": 16384}
CASES = (*(f"{size}-{search}" for size in SIZES for search in ("greedy", "beams")), "mixed")
CASES_OF = {"cpu": CASES, "cuda": (*CASES, "16k-beams-16")}
BATCH_SIZES = {"cpu": (1, 4, 8), "cuda": (1, 4, 8, 16)}
# Most documents of a case that are compared, one by one.
COMPARED = 4
# The goals on the CPU are LED-base's, those on CUDA LED-large's.
GOALS: dict[tuple[str, str, str], dict[str, str]] = {
    ("cpu", "float32", "4k-greedy"): {"per_token": "at least 1.0"},
    ("cpu", "float32", "16k-greedy"): {"per_token": "at least 1.0"},
    ("cpu", "float32", "4k-beams"): {"per_token": "at least 5.0"},
    ("cpu", "float32", "16k-beams"): {"per_token": "at least 9.0", "memory": "at most 0.25"},
    ("cpu", "float32", "mixed"): {"whole": "at least 6.0"},
    ("cpu", "bfloat16", "16k-beams"): {"per_token": "at least 12.0"},
    ("cuda", "bfloat16", "16k-greedy"): {"per_token": "at least 8.0"},
    ("cuda", "bfloat16", "16k-beams-16"): {
        "whole": "at least 10.0",
        "floor_share": "at least 0.45",
    },
}


@dataclass(frozen=True)
class Theirs:
    """transformers' model in one dtype, and the batch size that suits it."""

    model: Any
    batch_size: int

    def run(self, work: Work) -> Callable[[], Any]:
        return lambda: generate_run(self.model, work, self.batch_size)


@dataclass(frozen=True)
class Times:
    """Median seconds of one side: for all tokens, and until the first logits."""

    whole: float
    first: float

    @property
    def decode(self) -> float:
        return self.whole - self.first


def make_work(case: str, num_new: int | None, num_mixed: int) -> Work:
    draw = random.Random(0)
    num_beams = 1 if case.endswith("greedy") else BEAMS
    if case == "mixed":
        lengths = [200, 8000, *(draw.randint(200, 8000) for _ in range(num_mixed - 2))]
        new_tokens = [draw.randint(10, 128) for _ in lengths]
    elif case == "16k-beams-16":
        lengths, new_tokens = [16384] * 16, [256] * 16
    else:
        size, search = case.split("-")
        lengths, new_tokens = [SIZES[size]], [num_new or NEW_TOKENS[search]]
    documents = [draw.choices(range(4, 50000), k=length) for length in lengths]
    return Work(documents, new_tokens, GenerationConfig(num_beams=num_beams))


def make_models(geometry: str, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """Return our model, and transformers' with the same weights in the dtypes it may take."""
    torch.manual_seed(0)
    values = GEOMETRIES[geometry]
    published = transformers.LEDForConditionalGeneration(transformers.LEDConfig(**values)).eval()
    ours = LEDForConditionalGeneration(LEDConfig(**values)).eval()
    ours.load_state_dict(published.state_dict())
    theirs = {dtype: published}
    if dtype == "bfloat16" and device == "cpu":
        exact = transformers.LEDForConditionalGeneration(published.config).eval()
        exact.load_state_dict(published.state_dict())
        theirs["float32"] = exact
    moved = {name: model.to(device, getattr(torch, name)) for name, model in theirs.items()}
    return ours.to(device, getattr(torch, dtype)), moved


def best_batch_size(model: Any, work: Work) -> int:
    """Try a few documents of middle length, and a quarter of their tokens."""
    sizes = BATCH_SIZES[model.device.type]
    if len(work.documents) == 1:
        return 1
    first = max(0, (len(work.documents) - max(sizes)) // 2)
    sample = work.of(work.longest_first()[first : first + max(sizes)])
    sample = sample.writing([math.ceil(count / 4) for count in sample.new_tokens])
    seconds = {size: seconds_of(model, sample, size) for size in sizes}
    return min(seconds, key=lambda size: seconds[size])


def seconds_of(model: Any, work: Work, batch_size: int) -> float:
    """Return the seconds that a batch size takes: without end where memory does not suffice."""
    started = time.perf_counter()
    try:
        generate_run(model, work, batch_size)
    except torch.OutOfMemoryError:
        return math.inf
    return time.perf_counter() - started


def step_bytes(config: LEDConfig, work: Work, itemsize: int) -> int:
    """Return what a step of all documents has to read at least, halfway through the output.

    The absorbed form reads the weights of the cross-attention's keys and values at every step and
    the source's states in every layer; the projected one reads keys and values instead.
    """
    d, layers = config.d_model, config.decoder_layers
    num_tokens = sum(map(len, work.documents))
    # Self-attention has four projections, cross-attention two besides those of keys and values.
    weights = layers * (6 * d**2 + 2 * d * config.decoder_ffn_dim) + config.vocab_size * d
    source = layers * min(2 * num_tokens * d, num_tokens * d + 2 * d**2)
    written = layers * 2 * d * work.options.num_beams * sum(work.new_tokens) // 2
    return itemsize * (weights + source + written)


def measure(
    ours: LEDForConditionalGeneration,
    run_ours: Callable[[], Any],
    theirs: Mapping[str, Theirs],
    work: Work,
    rounds: int,
    warm_up: int,
) -> dict[str, Times]:
    first: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}

    def timed(name: str, model: Any, run: Callable[[], Any]) -> Callable[[], None]:
        return lambda: first[name].append(seconds_to_first_logits(model, run))

    calls = {"ours": timed("ours", ours, run_ours)}
    for name, their in theirs.items():
        calls[name] = timed(name, their.model, their.run(work))
    whole = alternate(calls, rounds, warm_up=warm_up)
    return {name: Times(whole[name], statistics.median(first[name][warm_up:])) for name in calls}


def seconds_to_first_logits(model: Any, run: Callable[[], Any]) -> float:
    """Run to the end; return when the output projection had its first result."""
    found: list[float] = []

    def note(*_: Any) -> None:
        if not found:
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - started)

    with model.lm_head.register_forward_hook(note):
        started = time.perf_counter()
        run()
    return found[0]


def figures(mine: Times, theirs: Times, work: Work) -> dict[str, Any]:
    """Return what the times say."""
    num_tokens = sum(work.new_tokens)
    num_decoded = num_tokens - len(work.documents)
    values: dict[str, Any] = {
        "per_token": theirs.decode / mine.decode,
        "whole": theirs.whole / mine.whole,
        "first": theirs.first / mine.first,
    }
    for prefix, times in (("", mine), ("transformers_", theirs)):
        values |= {
            f"{prefix}ms_per_token": 1e3 * times.decode / num_decoded,
            f"{prefix}decoded_tokens_per_s": num_decoded / times.decode,
            f"{prefix}tokens_per_s": num_tokens / times.whole,
            f"{prefix}first_token_s": times.first,
        }
        if len(set(work.new_tokens)) == 1:
            values[f"{prefix}ms_per_step"] = 1e3 * times.decode / (work.new_tokens[0] - 1)
    return values


def floor(
    config: LEDConfig, work: Work, mine: Times, itemsize: int, bytes_per_s: float | None
) -> dict[str, Any]:
    """Return the bytes of a step, and which share of its time they take by themselves."""
    if len(set(work.new_tokens)) > 1:
        return {}
    num_bytes = step_bytes(config, work, itemsize)
    if bytes_per_s is None:
        return {"step_bytes": num_bytes}
    step_s = mine.decode / (work.new_tokens[0] - 1)
    share = num_bytes / bytes_per_s / step_s
    return {"step_bytes": num_bytes, "copy_bytes_per_s": bytes_per_s, "floor_share": share}


def bench(
    case: str,
    ours: LEDForConditionalGeneration,
    models: dict[str, Any],
    given: argparse.Namespace,
    bytes_per_s: float | None,
) -> None:
    """Run one case; `models` are transformers', the first in the dtype of ours."""
    work, dtype = make_work(case, given.new_tokens, given.mixed), next(iter(models))
    run_ours = functools.partial(engine_run, ours, work, cuda_graphs=given.cuda_graphs)
    agreement = check(case, ours, run_ours(), models[dtype], work, must_agree=dtype == "float32")
    theirs = {name: Theirs(model, best_batch_size(model, work)) for name, model in models.items()}
    # That case takes long: trials of batch sizes have run everything before, and no goal is memory.
    is_long = case == "mixed"
    times = measure(ours, run_ours, theirs, work, given.rounds, warm_up=0 if is_long else 1)
    grown = functools.partial(peak_bytes_on, given.device)
    memory = 0 if is_long else grown(run_ours)
    itemsize = getattr(torch, dtype).itemsize
    for name, their in theirs.items():
        emit(
            "generation",
            case,
            model=given.model,
            device=device_name(given.device),
            dtype=dtype,
            transformers_dtype=name,
            transformers_batch_size=their.batch_size,
            documents=len(work.documents),
            source_tokens=sum(map(len, work.documents)),
            new_tokens=sum(work.new_tokens),
            beams=work.options.num_beams,
            rounds=given.rounds,
            goals=GOALS.get((given.device, dtype, case), {}),
            **figures(times["ours"], times[name], work),
            **floor(ours.config, work, times["ours"], itemsize, bytes_per_s),
            **({} if is_long else memory_figures(memory, grown(their.run(work)))),
            **agreement,
        )


def memory_figures(mine: int, theirs: int) -> dict[str, Any]:
    """Return how much more memory each side took at most while it ran."""
    return {"memory": mine / theirs, "peak_bytes": mine, "transformers_peak_bytes": theirs}


def check(
    case: str,
    ours: LEDForConditionalGeneration,
    outputs: Sequence[Generation],
    theirs: Any,
    work: Work,
    *,
    must_agree: bool,
) -> Mapping[str, float]:
    """Compare what all documents became together with a few of them, decoded alone by theirs."""
    sample = range(0, len(work.documents), max(1, len(work.documents) // COMPARED))
    few = work.of(sample)
    together, alone = [outputs[index] for index in sample], generate_scored(theirs, few)
    return compare(ours, few, together, alone, case, must_agree=must_agree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--mixed", type=int, default=32, help="documents of the case `mixed`")
    parser.add_argument("--model", choices=list(GEOMETRIES))
    parser.add_argument("--device", choices=list(CASES_OF), default="cpu")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    given = parser.parse_args()
    cases = given.cases or CASES_OF[given.device]
    unknown = set(cases) - set(CASES_OF["cuda"])
    if unknown or (given.new_tokens or 2) < 2:
        parser.error(f"unknown: {unknown}" if unknown else "--new-tokens is 2 or more")
    given.model = given.model or {"cpu": "base", "cuda": "large"}[given.device]
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    bytes_per_s = cuda_bytes_per_s() if given.device == "cuda" else None
    for dtype in given.dtype:
        ours, models = make_models(given.model, dtype, given.device)
        for case in cases:
            bench(case, ours, models, given, bytes_per_s)


if __name__ == "__main__":
    main()
