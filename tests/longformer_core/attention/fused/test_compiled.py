"""The Triton kernels compile for Ampere and Hopper, on any machine, and keep to the registers.

Compiling goes on in a process of its own: in this one the kernels may be interpreted (see
test_fused.py). As a script, `python test_fused_compiled.py` prints a line for each variant, and
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
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


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

    from longformer_core.attention.fused import window as fused

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q = torch.empty(0, 1, variant.head, dtype=dtypes[variant.dtype])
    sizes = fused._sizes(variant.head)
    flags = {
        "DILATION": 2 if "dilated" in variant.extras else 1,
        "CAUSAL": "causal" in variant.extras,
        "HAS_INVALID": "invalid" in variant.extras,
        "HAS_DROPOUT": "dropout" in variant.extras,
    }
    if "invalid" not in variant.extras:
        flags["valid"] = None
    # Of 16 bits the output's remainder is kept for the gradients.
    remainder = {"remainder": None} if variant.dtype == "fp32" else {}
    if variant.kernel == "delta":
        return fused._delta, {**sizes, **remainder, "OWN": fused._READ}, fused._FUSED
    if variant.kernel == "sum":
        return (
            fused._sum_parts,
            {"SIZE": 12 * variant.head, "BLOCK": fused._SUM_BLOCK},
            fused._FUSED,
        )
    tiles = fused._tiles(variant.kernel, q, has_dropout="dropout" in variant.extras)
    has_globals = "globals" in variant.extras
    if variant.kernel == "keys":
        flags["HAS_GLOBALS"] = has_globals
        if not has_globals:
            flags |= {"global_dk": None, "global_dv": None}
    elif variant.kernel != "globals":
        flags |= {**remainder, "BLOCK": fused._BLOCK} if variant.kernel == "forward" else {}
        flags["GLOBALS"] = tiles.step if has_globals else 0
    cut = fused._cut(tiles, **({"GLOBALS": tiles.own} if variant.kernel == "globals" else {}))
    options = {name: cut.pop(name) for name in ("num_warps", "num_stages", *fused._FUSED)}
    kernels = {
        "forward": fused._forward,
        "queries": fused._backward_queries,
        "keys": fused._backward_keys,
        "globals": fused._backward_globals,
    }
    return kernels[variant.kernel], {**sizes, **flags, **cut}, options


def _cut_rows(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return what `_cut` does, of the kernels for few rows."""
    import torch

    from longformer_core.attention.fused import few_queries as rows

    name = variant.kernel.removeprefix("rows-")
    sizes = rows._sizes(variant.head)
    if name == "join":
        remainder = {"remainder": None} if variant.dtype == "fp32" else {}
        return rows._join, {**sizes, **remainder, "JOINED": rows._JOINED}, rows._FUSED
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    q = torch.empty(0, 1, variant.head, dtype=dtypes[variant.dtype])
    cut: dict[str, Any] = rows._cut(rows._tiles(name, q, 64 if "many" in variant.extras else 16))
    options = {name: cut.pop(name) for name in ("num_warps", "num_stages", *rows._FUSED)}
    flags = {
        "HAS_INVALID": "invalid" in variant.extras,
        "HAS_DROPOUT": "dropout" in variant.extras,
    }
    if "invalid" not in variant.extras:
        cut["valid"] = None
    kernels = {
        "forward": rows._forward,
        "queries": rows._backward_queries,
        "keys": rows._backward_keys,
    }
    return kernels[name], {**sizes, **flags, **cut}, options


def _type(name: str, variant: Variant, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in ("q", "k", "v", "grad", "out", "remainder", "dq", "dk", "dv"):
        return f"*{variant.dtype}"
    if name in ("items", "heads", "globals_", "ranks", "table"):
        return "*i32"
    if name in ("valid", "segments"):
        return {"valid": "*u8", "segments": "*i64"}[name]
    if name in ("factor", "scale", "kept_scale"):
        return "fp32"
    numbers = ("radius", "size", "threshold", "rows_each")
    strides = ("_stride", "_batch", "_head", "_token", "_row")
    if name in numbers or name.startswith("num_") or name.endswith(strides):
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
