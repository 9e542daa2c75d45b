"""The Ray cluster of a run: one that was named, or an embedded one that ends with the run.

Never one that happens to be there: `ray.init()` without an address joins any cluster it finds.
"""

import atexit
import contextlib
import functools
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import Refused
from pipelines.storage import Location

logger = logging.getLogger(__name__)

# The embedded cluster has two logical CPUs more than cores: the checkpoint filter of a resume and
# the tokenizer each hold one, mostly idle, beside a worker that keeps the cores busy.
EXTRA_CPUS = 2
# What a resume needs beside the workers, which do with none.
MIN_CPUS = 2
_OBJECT_STORE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Cluster:
    """What a run can be planned on."""

    num_cpus: float
    num_gpus: float
    num_cores: int  # of one node: what a worker's threads may use
    embedded: bool


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[Cluster]:
    """Join the cluster at `address` or RAY_ADDRESS, else run an embedded one for this block.

    A program that has called `ray.init` itself keeps its cluster, before, in and after the block.
    Environment, loggers and the handler of SIGTERM are as before when the block ends.
    Raises: Refused if the cluster cannot be joined or is too small for a resume to be scheduled.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with _put_back(), contextlib.ExitStack() as stack:
        _quiet()
        joined = bool(address) or ray.is_initialized()
        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            stack.enter_context(_joined(address) if address else _embedded())
        cluster = _measure(embedded=not joined)
        if cluster.num_cpus < MIN_CPUS:
            raise Refused(
                f"the cluster has {cluster.num_cpus:g} CPUs; a run needs {MIN_CPUS}: one for the "
                "tokenizer, one for the checkpoint filter of a resume"
            )
        yield cluster


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """Undo at the end what we and Ray change in this process for a run."""
    environment = _ray_environment()
    loggers = [
        (logger, logger.level, [(handler, handler.level) for handler in logger.handlers])
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "ray"
    ]
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        for name in _ray_environment().keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for logger, level, handlers in loggers:
            logger.setLevel(level)
            logger.handlers = [handler for handler, _ in handlers]
            for handler, handler_level in handlers:
                handler.setLevel(handler_level)
        if threading.current_thread() is threading.main_thread() and on_sigterm is not None:
            signal.signal(signal.SIGTERM, on_sigterm)
        if not ray.is_initialized():
            _read_token_anew()


def _ray_environment() -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONBREAKPOINT")
    return {k: v for k, v in os.environ.items() if k.startswith("RAY_") or k in ours}


def _read_token_anew() -> None:
    """Have Ray's core look at RAY_AUTH_MODE and for the token again when it next needs them.

    It reads both once per process. Without this a program's own `ray.init` after a run would start
    a cluster that asks for the program's token and show it ours, and the other way round.
    """
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _quiet() -> None:
    """One story on the console, the run's own; Ray's stays in its log files."""
    for name in ("ray.data", "ray.train", "ray"):
        for handler in logging.getLogger(name).handlers:
            # Not those that it shares with the root: they are the program's, as in a test.
            if isinstance(handler, logging.StreamHandler) and handler not in logging.root.handlers:
                handler.setLevel(logging.CRITICAL)
    # Ray Data hands every actor pool its context through the object store and Ray's core calls
    # that an error. It is lost with the driver's node only, and then the run is lost too.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    if address.startswith("ray://"):
        raise Refused(f"{address}: submit the job to the cluster (ray job submit) instead")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise Refused(f"cannot join the Ray cluster at {address}: {error}") from error
    yield


@contextlib.contextmanager
def _embedded() -> Iterator[None]:
    # Worker processes import this very checkout or installation.
    root = str(Path(__file__).resolve().parent.parent)
    search = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(search)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray puts its workers behind everything else on the machine (nice 15): then the driver's
        # scheduling loop takes a core from one thread of a model, and the others wait for it.
        "RAY_worker_niceness": "0",
    }
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray turns token authentication on by itself here (set now, after its import, the mode
        # would reach the children and not this process). Left to itself it would also write a
        # token that everybody may read to the home directory, and say so in a warning.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        environment["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    os.environ.update(environment)
    _read_token_anew()
    ray.init(
        address="local",
        num_cpus=num_cores() + EXTRA_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=_object_store_bytes(),
    )
    yield


@functools.cache
def _token_file() -> Path:
    """A token for the clusters of this process."""
    private = tempfile.TemporaryDirectory(prefix="longhaul-")
    atexit.register(private.cleanup)
    token = Path(private.name, "token")
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _object_store_bytes() -> int:
    pages, page = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return min(_OBJECT_STORE_BYTES, int(pages * page * 0.3))


def _measure(*, embedded: bool) -> Cluster:
    have = ray.cluster_resources()
    if embedded:
        return Cluster(have["CPU"], have.get("GPU", 0.0), num_cores(), True)
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    widest = int(max(n.get("CPU", 1.0) for n in nodes))
    return Cluster(have.get("CPU", 0.0), have.get("GPU", 0.0), max(1, widest), False)


def has_gpu(address: str | None) -> bool:
    """Has the cluster at `address` or RAY_ADDRESS a GPU, or without either, this machine?"""
    if address or "RAY_ADDRESS" in os.environ:
        with connect(address) as cluster:
            return cluster.num_gpus > 0
    return torch.cuda.is_available()


def check_visible(locations: Sequence[Location]) -> None:
    """Ask every node whether it sees these local paths.

    Raises: Refused naming the nodes that do not.
    """
    paths = [loc.path for loc in locations if loc.is_local]
    nodes = [n for n in ray.nodes() if n["Alive"]]
    if not paths or len(nodes) < 2:
        return
    probe = ray.remote(num_cpus=0)(_missing)
    asked = {
        node["NodeManagerAddress"]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths)
        for node in nodes
    }
    problems = [
        f"{path}: node {address} does not see it; use a shared file system or an object store"
        for address, answer in asked.items()
        for path in ray.get(answer, timeout=60.0)
    ]
    if problems:
        raise Refused(problems)


def _missing(paths: list[str]) -> list[str]:
    return [p for p in paths if not os.path.exists(p)]
