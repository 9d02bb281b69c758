"""What the Triton kernels need on a GPU: registers, spills, shared memory, tensor-core instructions.

Triton compiles ahead of time for any GPU, so none is needed here. The sizes are those of the released super-resolution
stages, 60 x 60 tokens and 48 heads of 64, with 20 x 20 coarse keys or 16 text keys beside those of the same grid.

    python benchmarks/kernel_resources.py                 every tile that is tried, in bfloat16 and float32
    python benchmarks/kernel_resources.py --quick         the first tile of each kernel in bfloat16
    python benchmarks/kernel_resources.py --json FILE     also writes the numbers; with "-" it prints only the numbers
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minicogview.kernels import launch

GRID, COARSE, TEXT = (60, 60), (20, 20), 16
OWN_KEYS = (*GRID, 1, 1, 4, 2, 4, 2, 0, 0, 1)
COARSE_KEYS = (*COARSE, 3, 3, 2, 2, 2, 2, 0, 0, 1)
TEXT_KEYS = (1, TEXT, *GRID, 0, 0, 0, TEXT - 1, 0, 1, 1)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"GRID_Y": 60, "GRID_X": 60, "HEADS": 48, "HEAD": 64, "HEAD_BLOCK": 64}
# name, kernel, the geometry of its keys
KERNELS: list[tuple[str, Any, dict[str, Any]]] = [
    ("forward", launch.forward, {"GEOS": (OWN_KEYS, COARSE_KEYS)}),
    ("forward", launch.forward, {"GEOS": (OWN_KEYS, TEXT_KEYS)}),
    ("backward_queries", launch.backward_queries, {"GEOS": (OWN_KEYS, COARSE_KEYS)}),
    ("backward_keys", launch.backward_keys["own"], {"GEO": OWN_KEYS}),
    ("backward_keys", launch.backward_keys["coarse"], {"GEO": COARSE_KEYS}),
    ("backward_keys", launch.backward_keys["row"], {"GEO": TEXT_KEYS}),
]


def compile_for(target: GPUTarget, kernel: Any, constants: dict[str, Any], dtype: str, config: triton.Config) -> Any:
    """Compile a kernel, told that pointers and strides are multiples of 16, as they are at these sizes."""
    function, n_kinds = kernel.fn, len(constants.get("GEOS", ()))
    types: dict[str, Any] = {}
    for name in inspect.signature(function.fn).parameters:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_at"):
            types[name] = "*fp32" if re.match("bias|log_sum|delta", name) else f"*{dtype}"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
        if n_kinds and name in launch.KEY_NAMES:
            types[name] = (types[name],) * n_kinds  # a tuple, one entry for each kind of keys
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, kind in enumerate(types.values()):
        if kind[0][0] in "*i":
            places = [(i, j) for j in range(n_kinds)] if isinstance(kind, tuple) else [(i,)]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(function, types, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers per thread, spilled bytes, bytes of shared memory, matrix instructions."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            return int(found.group(1)) if found else 0

        spilled = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
        return {
            "registers": number("vgpr_count"),
            "spilled_bytes": spilled,
            "shared_bytes": shared,
            "matrix_instructions": len(re.findall(r"v_mfma", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(beside) if beside.exists() else shutil.which("cuobjdump") or "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "shared_bytes": shared,
        "matrix_instructions": products,
    }


def main() -> None:
    """Print a row for every kernel, type, tile and GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    quiet = options.json == "-"
    rows = []
    if not quiet:
        print(f"{'kernel':18}{'keys':>8}{'type':>6}{'target':>8}{'tile':>8}{'step':>6}{'warps':>7}"
              f"{'registers':>11}{'spilled B':>11}{'shared B':>10}{'matrix ops':>12}")  # fmt: skip
    for name, kernel, geometry in KERNELS:
        last = geometry.get("GEO") or geometry["GEOS"][-1]
        keys = "own" if last == OWN_KEYS else "coarse" if last == COARSE_KEYS else "text"
        for dtype in ("bf16",) if options.quick else ("bf16", "fp32"):
            for config in kernel.configs[: 1 if options.quick else None]:
                for target_name, target in TARGETS.items():
                    exact = dtype == "fp32" and target.backend == "cuda"
                    constants = {**SIZES, **geometry, **config.kwargs, "PRECISION": "tf32x3" if exact else "ieee"}
                    compiled = compile_for(target, kernel, constants, dtype, config)
                    step = config.kwargs.get("KEYS") or config.kwargs["QUERIES"]
                    row = {
                        "kernel": name,
                        "keys": keys,
                        "dtype": dtype,
                        "target": target_name,
                        "tile": [config.kwargs["TILE_Y"], config.kwargs["TILE_X"]],
                        "step": step,
                        "warps": config.num_warps,
                        **resources(compiled, target),
                    }
                    rows.append(row)
                    if not quiet:
                        tile = "{}x{}".format(*row["tile"])
                        print(f"{name:18}{keys:>8}{dtype:>6}{target_name:>8}{tile:>8}{step:6}{config.num_warps:7}"
                              f"{row['registers']:11}{row['spilled_bytes']:11}{row['shared_bytes']:10}"
                              f"{row['matrix_instructions']:12}", flush=True)  # fmt: skip
    if quiet:
        print(json.dumps(rows))
    elif options.json:
        result = {"triton": triton.__version__, "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
