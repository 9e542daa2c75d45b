"""How the benchmarks measure: side by side, alternating, medians, one JSON line per result."""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def settings(description: str | None, *, rounds: int) -> argparse.Namespace:
    """Read --rounds and --threads, and set the threads and the seed: of benchmarks without more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return given


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, warm_up: int = 1
) -> dict[str, float]:
    """Return the median seconds of each call; they take turns, the first ones are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def best_per_document(
    make: Callable[[int], Mapping[str, Callable[[], Any]]], batch_sizes: Sequence[int], rounds: int
) -> dict[str, tuple[int, float]]:
    """Return the batch size at which each call is fastest, and its median seconds for a document.

    All calls of one batch size take turns; one that does not fit into the memory is left out there.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for size in batch_sizes:
        calls = {name: call for name, call in make(size).items() if fits(call)}
        for name, seconds in alternate(calls, rounds, warm_up=0).items():
            found.setdefault(name, []).append((seconds / size, size))
    return {name: min(times)[::-1] for name, times in found.items()}


def fits(call: Callable[[], Any]) -> bool:
    """Run a call; tell whether the device's memory sufficed."""
    try:
        call()
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return False
    return True


def waited_for(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return a call that ends when the device has done its work."""

    def run() -> Any:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def peak_bytes_on(device: str, call: Callable[[], Any]) -> int:
    """Return by how much the memory that the device computes in grew at most during a call."""
    return cuda_peak_bytes(call) if device == "cuda" else peak_bytes(call)


def device_name(device: str) -> str:
    """Return what a result says of where it was measured."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def distance(ours: Tensor, oracle: Tensor) -> float:
    """Return the L2 norm of the difference over the L2 norm of the oracle."""
    mine, theirs = ours.detach().double(), oracle.detach().double()
    return float((mine - theirs).norm() / theirs.norm())


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return by how much the process grew at most during a call (Linux with glibc).

    Memory that earlier calls freed goes back first: a call that reused it would seem to need none.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM")
    del kept
    return peak - before


def new_page_us(num_bytes: int) -> float:
    """Return the microseconds of a core for each page of so much memory that is new to the process.

    The system clears a page before it hands it out. A virtual machine that gives free memory back
    to its host has to ask for it first, which takes several times as long; so afterwards so much
    memory is at hand, at least for a while.
    """
    started = time.process_time()
    torch.empty(num_bytes, dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)
    return (time.process_time() - started) / (num_bytes / mmap.PAGESIZE) * 1e6


def cuda_peak_bytes(call: Callable[[], Any]) -> int:
    """Return by how much the memory of the current CUDA device grew at most during a call."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def cuda_bytes_per_s() -> float:
    """Return the bandwidth of a large copy on the current CUDA device, reads and writes counted."""
    given = torch.randn(2**28, device="cuda")
    taken = torch.empty_like(given)

    def copy() -> None:
        for _ in range(10):
            taken.copy_(given)
        torch.cuda.synchronize()

    return 10 * 2 * given.nbytes / alternate({"copy": copy}, 5)["copy"]


def cuda_flops_per_s(dtype: torch.dtype) -> float:
    """Return the flops of a large product of random numbers on the current CUDA device."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))

    def product() -> None:
        for _ in range(10):
            one @ other
        torch.cuda.synchronize()

    return 10 * 2 * 8192**3 / alternate({"product": product}, 5)["product"]


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def emit(bench: str, kind: str, **values: Any) -> dict[str, Any]:
    """Print one result with the machine and the versions it was made with; return it."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    line = {"bench": bench, "kind": kind} | _rounded(values)
    machine = {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    print(json.dumps(line | machine | {"versions": versions}), flush=True)
    return line


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: _rounded(inner) for name, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a Markdown table, beside the JSON lines: to the standard error."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [
        [
            f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, ""))
            for name in names
        ]
        for row in rows
    ]
    for line in lines:
        print("|", " | ".join(line), "|", file=sys.stderr)
