"""What encoding and decoding hold beside the weights, and how much memory there is.

Shape letters: T packed tokens, n source tokens of one document, m output tokens, d hidden size, f
feed-forward size.
"""

import os
from pathlib import Path

import torch

from longformer_core.attention.global_attention import Form, is_cheaper_absorbed
from longformer_core.config import LEDConfig

# Logits are held as such, as log-probabilities, and once more while these are made.
_LOGIT_COPIES = 3
_NO_LIMIT = 2**63
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def encoding_numbers(d: int, f: int, num_tokens: int, most_rows: int) -> int:
    """Return the most numbers alive inside one encoder layer, of T packed tokens.

    Units: `most_rows` of them go through the feed-forward at once (see `chunks.in_chunks`).
    """
    # Beside five of T x d: query and key in the attention, or what the feed-forward makes inside.
    return 5 * num_tokens * d + max(2 * num_tokens * d, min(num_tokens, most_rows) * (2 * d + f))


def decoding_numbers(
    config: LEDConfig,
    n: int,
    num_rows: int,
    m: int,
    *,
    form: Form = "auto",
    training: bool = False,
) -> int:
    """Return the numbers held to decode one document: its source, its own tokens, and logits.

    Units: `num_rows` rows of `m` tokens each. In training all of them are read at once.
    """
    source = source_numbers(config, n, num_rows * m, form=form)
    if not training:
        return source + num_rows * row_numbers(config, m)
    own = config.decoder_layers * (14 * config.d_model + 2 * config.decoder_ffn_dim)
    return source + num_rows * m * (own + config.vocab_size * _LOGIT_COPIES)


def source_numbers(config: LEDConfig, n: int, num_reads: int, *, form: Form = "auto") -> int:
    """Return the numbers held of a source that is read so many times, by rows times steps."""
    d, layers, heads = config.d_model, config.decoder_layers, config.decoder_attention_heads
    absorbed = form == "absorbed" or (
        form == "auto" and is_cheaper_absorbed(num_reads, n, heads, d)
    )
    return n * d * (2 if absorbed else 1 + 2 * layers)


def row_numbers(config: LEDConfig, m: int) -> int:
    """Return the numbers held of one row of up to m tokens that is generated, and its logits."""
    return m * 2 * config.d_model * config.decoder_layers + config.vocab_size * _LOGIT_COPIES


def available_bytes(device: torch.device) -> int:
    """Return how much memory a new tensor on the device could take (Linux, CUDA).

    On a CPU what the system, or the control group that this process is in, has left. What torch
    keeps of the device for itself counts as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_bytes(), _group_bytes())


def _system_bytes() -> int:
    """Return what is available; where the system does not say, all the memory there is."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return _field(meminfo, "MemAvailable:") * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_bytes() -> int:
    """Return what this process's control group, and those around it, leave (version 2)."""
    try:
        lines = _OWN_GROUP.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")
    # Inside a container the path may be the host's; then the container's own is the top one.
    folder = _GROUPS.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
    above = [parent for parent in folder.parents if parent.is_relative_to(_GROUPS)]
    return min(map(_left_in, [folder, *above]))


def _left_in(folder: Path) -> int:
    """Return what one group leaves, and more than any machine has where it sets no limit."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        # Pages of files, which the system takes back when it needs them.
        used -= _field(folder / "memory.stat", "inactive_file")
    except OSError:
        return _NO_LIMIT
    return _NO_LIMIT if limit == "max" else max(0, int(limit) - used)


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LookupError(f"{file} has no line {name}")
