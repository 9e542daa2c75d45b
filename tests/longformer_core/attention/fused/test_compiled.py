"""The Triton kernels compile for Ampere and Hopper, on any machine, and keep to the registers.

Compiling goes on in a process of its own: in this one the kernels may be interpreted (see
test_window.py). As a script, `python test_compiled.py` prints a line for each variant, and
with arguments only for the variants whose names hold one of them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

# What a block may have on compute capability 8.6, the smallest of the Ampere GPUs' limits.
SHARED_BYTES = 99 * 1024


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled; `extras` of globals, invalid, dropout, causal, dilated.

    The kernels of few_queries.py are "rows-"; theirs are invalid, dropout and many (rows).
    """

    kernel: str
    capability: int
    dtype: str
    head: int
    extras: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(
            [self.kernel, f"sm{self.capability}", self.dtype, str(self.head), *self.extras]
        )


PLAIN = [
    Variant(kernel, capability, dtype, head)
    for kernel, capability, dtype, head in product(
        ("forward", "queries", "keys"), (80, 90), ("bf16", "fp32"), (64, 128)
    )
]
COMBINED = [
    Variant(kernel, capability, "bf16", 64, extras)
    for kernel, capability, extras in product(
        ("forward", "queries", "keys"),
        (80, 90),
        (("globals",), ("globals", "invalid", "dropout"), ("causal", "dilated")),
    )
]
SMALL = [
    Variant("globals", 80, "bf16", 64, ("globals",)),
    Variant("globals", 90, "bf16", 64, ("globals",)),
    Variant("globals", 90, "bf16", 128, ("globals", "invalid", "dropout")),
    Variant("globals", 80, "fp32", 128, ("globals",)),
    Variant("forward", 90, "fp16", 64, ("globals",)),
    Variant("forward", 80, "bf16", 96, ("globals",)),
    Variant("delta", 80, "bf16", 64),
    Variant("sum", 80, "fp32", 64),
]
ROWS = [
    Variant("rows-forward", 80, "bf16", 64),
    Variant("rows-forward", 90, "bf16", 64),
    Variant("rows-forward", 90, "bf16", 64, ("invalid", "dropout")),
    Variant("rows-forward", 80, "bf16", 128, ("many",)),
    Variant("rows-forward", 80, "fp32", 64, ("invalid",)),
    Variant("rows-join", 80, "bf16", 64),
    Variant("rows-queries", 80, "bf16", 64),
    Variant("rows-queries", 90, "bf16", 128, ("many",)),
    Variant("rows-keys", 80, "bf16", 64, ("many", "dropout")),
    Variant("rows-keys", 90, "bf16", 64, ("invalid",)),
]
VARIANTS = [*PLAIN, *COMBINED, *SMALL, *ROWS]
# One of each kind, for the ordinary run.
FEW = [
    Variant("forward", 90, "bf16", 64, ("globals",)),
    Variant("forward", 80, "bf16", 128),
    Variant("queries", 80, "bf16", 64, ("globals",)),
    Variant("keys", 90, "bf16", 64),
    Variant("globals", 80, "bf16", 64, ("globals",)),
    Variant("rows-forward", 90, "bf16", 64),
    Variant("rows-queries", 80, "bf16", 64),
    Variant("rows-keys", 90, "bf16", 64, ("invalid",)),
]


def compiled(variant: Variant) -> dict[str, Any]:
    """Compile one variant in this process and return what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cut = _cut_rows if variant.kernel.startswith("rows-") else _cut
    kernel, constants, options = cut(variant)
    signature = {name: _type(name, variant, constants) for name in kernel.arg_names}
    fixed = set(kernel.do_not_specialize or ())
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name not in fixed)
    }
    started = time.monotonic()
    binary = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", variant.capability, 32),
        options=options,
    )
    seconds = round(time.monotonic() - started, 1)
    return {
        "name": variant.name,
        **_resources(binary.asm["cubin"]),
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "seconds": seconds,
    }


def _cut(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a kernel, the constants it is compiled for, and the compiler's options."""
    import torch

    from longformer_core.attention.fused import common, window, window_backward, window_forward

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q = torch.empty(0, 1, variant.head, dtype=dtypes[variant.dtype])
    constants: dict[str, Any] = common.head_sizes(variant.head)
    # Of 16 bits the output's remainder is kept for the gradients.
    remainder = {"Remainder": None} if variant.dtype == "fp32" else {}
    if variant.kernel == "delta":
        constants |= {**remainder, "BLOCK_Q": common._READ}
        return common._delta_kernel, constants, common.FUSED_MULTIPLY_ADD
    if variant.kernel == "sum":
        constants = {"SIZE": 12 * variant.head, "BLOCK": window._SUM_BLOCK}
        return window_backward.sum_parts_kernel, constants, common.FUSED_MULTIPLY_ADD
    tiles = window._tiles(variant.kernel, q, has_dropout="dropout" in variant.extras)
    has_globals = "globals" in variant.extras
    constants |= {
        **tiles.blocks,
        "DILATION": 2 if "dilated" in variant.extras else 1,
        "CAUSAL": "causal" in variant.extras,
        "HAS_INVALID": "invalid" in variant.extras,
        "HAS_DROPOUT": "dropout" in variant.extras,
    }
    if "invalid" not in variant.extras:
        constants["Valid"] = None
    if variant.kernel == "keys":
        constants["HAS_GLOBALS"] = has_globals
        if not has_globals:
            constants |= {"Global_dK": None, "Global_dV": None}
    elif variant.kernel == "globals":
        constants["BLOCK_G"] = constants.pop("BLOCK_K")
    else:
        constants["BLOCK_G"] = tiles.block_k if has_globals else 0
    if variant.kernel == "forward":
        constants |= {**remainder, "GROUP": window._GROUP}
    kernels = {
        "forward": window_forward.forward_kernel,
        "queries": window_backward.backward_queries_kernel,
        "keys": window_backward.backward_keys_kernel,
        "globals": window_backward.backward_globals_kernel,
    }
    return kernels[variant.kernel], constants, tiles.options


def _cut_rows(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return what `_cut` does, of the kernels for few rows."""
    import torch

    from longformer_core.attention.fused import common, few_queries
    from longformer_core.attention.fused import few_queries_kernels as kernels

    name = variant.kernel.removeprefix("rows-")
    constants: dict[str, Any] = common.head_sizes(variant.head)
    if name == "join":
        if variant.dtype == "fp32":
            constants["Remainder"] = None
        constants["JOINED"] = few_queries._JOINED
        return kernels.join_kernel, constants, common.FUSED_MULTIPLY_ADD
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q = torch.empty(0, 1, variant.head, dtype=dtypes[variant.dtype])
    tiles = few_queries._tiles(name, q, 64 if "many" in variant.extras else 16)
    constants |= {
        **tiles.blocks,
        "HAS_INVALID": "invalid" in variant.extras,
        "HAS_DROPOUT": "dropout" in variant.extras,
    }
    if "invalid" not in variant.extras:
        constants["Valid"] = None
    named = {
        "forward": kernels.forward_kernel,
        "queries": kernels.backward_queries_kernel,
        "keys": kernels.backward_keys_kernel,
    }
    return named[name], constants, tiles.options


def _type(name: str, variant: Variant, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("Q", "K", "V", "Out", "Remainder", "dO", "dQ", "dK", "dV"):
        return f"*{variant.dtype}"
    if name in ("Items", "Heads", "Globals", "Ranks", "Table"):
        return "*i32"
    if name in ("Valid", "Segments"):
        return {"Valid": "*u8", "Segments": "*i64"}[name]
    if name in ("scale_log2", "scale", "kept_scale"):
        return "fp32"
    numbers = ("radius", "split_size", "threshold", "rows_each")
    if name in numbers or name.startswith(("num_", "stride_")):
        return "i32"
    return {"seed": "i64"}.get(name, "*fp32")


def _resources(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread, and bytes of its stack: what did not fit into registers."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
    }


@cache
def results(variants: tuple[Variant, ...]) -> dict[str, dict[str, Any]]:
    """Compile variants in another process and return what each takes."""
    root = Path(__file__).resolve().parents[4]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    names = ["=" + variant.name for variant in variants]
    done = subprocess.run(
        [sys.executable, __file__, *names], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def check(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\n" + json.dumps(found), end=" ")
    assert found["shared"] <= SHARED_BYTES
    assert found["spilled"] == 0


@pytest.mark.parametrize("variant", FEW, ids=lambda v: v.name)
def test_a_kernel_compiles(variant: Variant, capsys: pytest.CaptureFixture[str]) -> None:
    check(results(tuple(FEW))[variant.name], capsys)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_kernel_compiles(variant: Variant, capsys: pytest.CaptureFixture[str]) -> None:
    check(results(tuple(VARIANTS))[variant.name], capsys)


def main(wanted: list[str]) -> None:
    """Print a line for each variant whose name is `=wanted` or holds a `wanted`."""
    for variant in dict.fromkeys([*FEW, *VARIANTS]):
        name = variant.name
        if not wanted or any(w[1:] == name if w[0] == "=" else w in name for w in wanted):
            print(json.dumps(compiled(variant)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
