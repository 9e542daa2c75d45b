"""Where a model directory is: a path, a hub id, or the URL of an object store.

Only named protocols are followed: a model name often comes from a configuration file or a request,
and must not make this process fetch an arbitrary address.
"""

import logging
import os
import re
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from longformer_core.errors import CheckpointError

_logger = logging.getLogger(__name__)

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
# Only the first kind that a place has is fetched.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".ckpt")
_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    name: str | Path, *, revision: str | None = None, cache_dir: Path | None = None
) -> Path:
    """Return a local directory for a path, a Hugging Face hub id, or the URL of a directory.

    Hub ids go through `huggingface_hub`, whose cache and offline switch are honoured; `revision` is
    a branch, tag or commit there. A directory behind an s3, gs, az, abfs or abfss URL is copied to
    `cache_dir` (default `~/.cache/longhaul/models`) once per content.
    Raises: CheckpointError when there is no such directory, its protocol is not allowed, or a
        revision is asked of anything but a hub id.
    """
    text = str(name)
    is_hub_id = bool(_HUB_ID.fullmatch(text)) and not Path(name).expanduser().exists()
    if revision is not None and not is_hub_id:
        raise CheckpointError(
            f"revision {revision!r} is asked of {text!r}; only hub ids have revisions, a path or "
            "URL holds one model"
        )
    if "://" in text or "::" in text:
        return _resolve_url(text, cache_dir or Path.home() / ".cache" / "longhaul" / "models")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the model directory that holds it")
    if not is_hub_id:
        raise CheckpointError(
            f"{text!r} is neither a directory here nor a hub id such as 'allenai/led-base-16384'"
        )
    return _download(text, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    small = [*SMALL_FILES, "*.index.json"]
    try:
        for suffix in _WEIGHT_SUFFIXES:
            path = Path(
                snapshot_download(hub_id, revision=revision, allow_patterns=[*small, f"*{suffix}"])
            )
            if any(path.glob(f"*{suffix}")):
                break
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{hub_id!r} is not a directory here, and the hub gave no model of that name{at}: "
            f"{error}"
        ) from error
    return path


def _resolve_url(url: str, cache_dir: Path) -> Path:
    scheme, _, rest = url.partition("://")
    if "::" in url or scheme not in _SCHEMES:
        raise CheckpointError(
            f"{url!r} is not an allowed address of a model; use a path, a hub id, or a plain URL "
            f"with one of {', '.join(_SCHEMES)}"
        )
    if scheme == "file":
        path = Path(rest)
        if not path.is_dir():
            raise CheckpointError(f"{url!r} is not a directory of this machine")
        return path
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        files = _remote_files(filesystem, root)
        return _copy(filesystem, files, cache_dir)
    except ImportError as error:
        raise CheckpointError(f"{url!r} needs another package: {error}; install it") from error
    except OSError as error:
        raise CheckpointError(
            f"{url!r} cannot be read: {error}; check the name and your access to it"
        ) from error


def _remote_files(filesystem: Any, root: str) -> dict[str, str]:
    """Return the model files of a remote directory by name, weights in one format only."""
    names = {
        str(PurePosixPath(path).relative_to(root)): path
        for path in filesystem.find(root, maxdepth=2)
    }
    # Weights lie at the top.
    at_top = [name for name in names if "/" not in name]
    weights = next(
        (suffix for suffix in _WEIGHT_SUFFIXES if any(n.endswith(suffix) for n in at_top)), ".bin"
    )
    wanted = {
        name: path
        for name, path in sorted(names.items())
        if name in SMALL_FILES or (name in at_top and name.endswith((weights, ".index.json")))
    }
    if not wanted:
        raise FileNotFoundError(f"{root} holds no model files such as config.json")
    return wanted


def _copy(filesystem: Any, files: dict[str, str], cache_dir: Path) -> Path:
    """Copy files into a directory named by their content's version; another process may race us."""
    version = sha256(
        repr([(path, filesystem.ukey(path)) for path in files.values()]).encode()
    ).hexdigest()
    target = cache_dir / version[:32]
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=cache_dir))
    try:
        for name, path in files.items():
            _logger.info("copying %s", path)
            (part / name).parent.mkdir(exist_ok=True)
            filesystem.get_file(path, str(part / name))
        try:
            os.rename(part, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
