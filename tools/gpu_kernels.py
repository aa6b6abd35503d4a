"""Compile the GPU kernels for GPUs that are not here, and look at what the compiler made of them.

    python tools/gpu_kernels.py [--architectures 80,90,100] [--jobs 2]

Of each product: weights come by asynchronous copies of 16 bytes; on Hopper they are multiplied by
wgmma, on Blackwell by tcgen05, before that by mma.sync; nothing is spilled to local memory; shared
memory fits; codes become numbers without a conversion instruction a weight, counted in PTX (a cell
has 8192 weights, 64 for each of 128 threads, in each of a kind's loops); and where a case says so,
the instructions a weight of these loops, counted in the GPU's own code, are few enough.

What is few enough: an H200 reads some 4.4 TB/s and issues some 3e13 instructions of a lane in a
second.  At 70 % of that rate and with 4.5, 3.5 or 2.5 bits a weight, scales and all, it has 5.5,
4.3 or 3.0 instructions for a weight.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitmosaic.backends._triton import decoding, inputs, integers, kernels, layout, rounding
from bitmosaic.backends._triton.choices import limits
from bitmosaic.backends._triton.launch import DECODE_WARPS
from bitmosaic.backends._triton.layout import Arrays
from bitmosaic.backends._triton.pairs import coarse, torn

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have (CUDA programming guide, compute capabilities)."""
TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
"""With fewer than 16 tokens, in slices and, on Blackwell, for int8, Triton uses the oldest."""
WEIGHTS_A_THREAD = 64
A = layout.AFFINE
TABLE = layout.TABLE


@dataclass(frozen=True)
class Case:
    """A product to compile.

    Attributes:
        name: how it is called in the table.
        kinds: kinds of the weight's cells.
        tokens: tokens of a program.
        converts: whether codes may be converted one by one: look-up tables hold float32.
        kernel: the kernel's name; of others than products it is only seen that they compile.
        most: instructions a weight that its loops may have, on Ampere and Hopper.
        more: constants that are not the usual ones.
        types: types of arrays that are not the usual ones.
    """

    name: str
    kinds: tuple[layout.Kind, ...]
    dtype: str = "bf16"
    tokens: int = 16
    sub: int = 128
    scale: str = "pair"
    table_by: str = "none"
    gather: bool = True
    outliers: bool = False
    converts: bool = False
    kernel: str = "multiply"
    most: float | None = None
    more: dict[str, Any] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)


FP4: dict[str, Any] = {"sub": 16, "scale": "e4m3"}
ROWS: dict[str, Any] = {"sub": 32, "table_by": "row"}
PICK = {"PICK": True}
ONE: dict[str, Any] = {"tokens": 8, "more": {"UNROLL": 2, "ONE": True, "tokens": 1}}
ONE_BY_ONE: dict[str, Any] = {"tokens": 8, "more": {"ONE": True, "tokens": 1}}
EIGHT: dict[str, Any] = {"tokens": 8}
BYTES = {"words": "*i8"}
WHOLE = ((A, 1), (A, 2), (A, 3), (A, 4), (A, 8))
FLOATS = ((layout.E2M1, 4), (layout.E4M3, 8), (layout.E5M2, 8))
MIXED = ((layout.E2M1, layout.MIXED),)
CAST: dict[str, Any] = {"converts": True}
COLUMN: dict[str, Any] = {"scale": "none", "table_by": "column"}
CMPQ = ((TABLE, 2), (TABLE, 3), (TABLE, 4), (layout.FP16, 16))
CASES = (
    Case("int4, in order", ((A, 4),), gather=False, most=3.8),
    Case("int2, int3, int4", ((A, 2), (A, 3), (A, 4)), outliers=True, most=4.0),
    Case("int2, int3, int4; fp16", ((A, 2), (A, 3), (A, 4)), dtype="fp16"),
    Case("int2, int3, int4 of many weights", ((A, 2), (A, 3), (A, 4)), more={"MANY": True}),
    Case("int1, int8", ((A, 1), (A, 8))),
    Case("int2, int4; 64 tokens", ((A, 2), (A, 4)), tokens=64, most=6.0),
    Case("codebook3", ((TABLE, 3),), **COLUMN),
    Case("codebook2, codebook3, codebook4, fp16", CMPQ, **COLUMN),
    Case("nvfp4", ((layout.E2M1, 4),), **FP4),
    Case("nvfp4; one token", ((layout.E2M1, 4),), most=4.2, **FP4, **ONE),
    Case("fp8; one token", ((layout.E4M3, 8),), scale="none", most=4.2, **ONE),
    Case("codebook3; one token", ((TABLE, 3),), most=3.6, **COLUMN, **ONE_BY_ONE),
    Case(
        "codebook1, codebook2; one token",
        ((TABLE, 1), (TABLE, 2)),
        most=3.5,
        **COLUMN,
        **ONE_BY_ONE,
    ),
    Case("codebook4; one token", ((TABLE, 4),), most=5.0, **COLUMN, **ONE_BY_ONE),
    Case(
        "codebook4 of a tile, int4; one token",
        ((A, 4), (TABLE, 4)),
        table_by="cell",
        **ONE_BY_ONE,
    ),
    Case("codebook2 to 4, fp16; eight tokens", CMPQ, dtype="fp16", **COLUMN, **EIGHT),
    Case("codebook8; one token", ((TABLE, 8),), converts=True, **COLUMN, **ONE_BY_ONE),
    Case(
        "nvfp4 and fp8 blocks; one token",
        MIXED,
        most=8.0,
        **FP4,
        **ONE_BY_ONE,
    ),
    Case("int1, int8; one token", ((A, 1), (A, 8)), **ONE_BY_ONE),
    Case("int2, int3, int4; fp16, one token", ((A, 2), (A, 3), (A, 4)), dtype="fp16", **ONE_BY_ONE),
    Case("int3; 128 tokens", ((A, 3),), tokens=128),
    Case("int4 in groups of 32; one token", ((A, 4),), sub=32, most=4.8, **ONE),
    Case("int2, int3 in groups of 64; one token", ((A, 2), (A, 3)), sub=64, most=5.0, **ONE_BY_ONE),
    Case("int4 in groups of 32", ((A, 4),), sub=32),
    Case("mxfp4; one token", ((layout.E2M1, 4),), sub=32, scale="e8m0", most=4.5, **ONE),
    Case("mxfp4", ((layout.E2M1, 4),), sub=32, scale="e8m0"),
    Case("nvfp4; fp16", ((layout.E2M1, 4),), dtype="fp16", **FP4),
    Case("e5m2; fp16", ((layout.E5M2, 8),), dtype="fp16", scale="none"),
    Case("nvfp4 and fp8 blocks", MIXED, **FP4),
    Case("nvfp4 and fp8 blocks; 32 tokens", MIXED, tokens=32, **FP4),
    Case("fp8", ((layout.E4M3, 8),), scale="none"),
    Case(
        "int1 to int8, inputs int8; one token",
        WHOLE,
        kernel="multiply_whole",
        types=BYTES,
        tokens=8,
        most=4.5,
    ),
    Case("int2, int3, int4; float32, one token", WHOLE[1:4], dtype="fp32", **ONE_BY_ONE, **CAST),
    Case("int4; float32", ((A, 4),), dtype="fp32", tokens=8, **CAST),
    Case("nvfp4 and fp8 blocks; float32", MIXED, dtype="fp32", tokens=8, **CAST, **FP4),
    Case("int4 and int8, inputs int8", ((A, 4), (A, 8)), kernel="multiply_whole", types=BYTES),
    Case(
        "int2, int3, int4; one token",
        ((A, 2), (A, 3), (A, 4)),
        outliers=True,
        most=3.6,
        **ONE_BY_ONE,
    ),
    Case("int2; one token", ((A, 2),), most=3.0, **ONE),
    Case("int4, in order; one token", ((A, 4),), gather=False, most=3.2, **ONE),
    Case("int2, int3, int4; eight tokens", ((A, 2), (A, 3), (A, 4)), **EIGHT),
    Case("decoded", ((A, 3), (A, 8), (layout.TABLE, 4), (layout.RAW, 32)), kernel="decode", **ROWS),
    Case("rows decoded", MIXED, kernel="decode", more=PICK, **FP4),
    Case("decoded, packed as bytes", WHOLE, kernel="decode", types=BYTES, more={"IN_BYTES": True}),
    Case("decoded floats", FLOATS, kernel="decode", **FP4),
    Case("outliers added", (), kernel="add_outliers"),
    Case("rows' outliers added", (), kernel="add_outliers", more=PICK),
    Case("inputs put in order", (), kernel="put_in_order"),
    Case("inputs in tiles", (), kernel="round_tiles"),
    Case("inputs in bands", (), kernel="round_bands"),
)


def types(case: Case) -> Arrays:
    """Return a prepared weight with the types of its arrays in their place."""
    given: dict[str, Any] = dict.fromkeys(Arrays._fields, "*i32")
    given |= {"words": "*i16", "high": "*i16", "points": "*i16"}
    given |= dict.fromkeys(("factors", "tables", "outlier_values"), "*fp32")
    return Arrays(**(given | case.types))


def eights(case: Case) -> int:
    """Count the eights of entries of tables in registers."""
    found = [2 if bits == 4 else 1 for grid, bits in case.kinds if grid == layout.TABLE]
    return max(found, default=0) if case.table_by in ("cell", "column") else 0


def source(case: Case) -> ASTSource:
    """Describe a kernel with its types, constants, and what is known of alignment."""
    home = next(
        each
        for each in (kernels, inputs, integers, decoding, rounding)
        if hasattr(each, case.kernel)
    )
    kernel = getattr(home, case.kernel)
    names = kernel.arg_names
    constants: dict[str, Any] = {
        "KINDS": case.kinds,
        "POINTS": bool(case.kinds) and case.kinds[0][0] == layout.AFFINE,
        "SCATTER": case.gather,
        "BIAS": False,
        "MANY": False,
        "ONE": False,
        "UNROLL": 1,
        "TOKENS": case.tokens,
        "SHARED": True,
        "STAGES": 4,
        "SUBS": layout.COLUMNS // case.sub,
        "SCALE": case.scale,
        "TABLE_BY": case.table_by,
        "EIGHTS": eights(case),
        "GATHER": case.gather and (case.tokens <= 8 or not case.kernel.startswith("multiply")),
        "GROUPED": case.sub < layout.COLUMNS and any(grid != A for grid, _ in case.kinds),
        "MOVE": True,
        "IN_BYTES": False,
        "CUT": False,
        "OUTLIERS": case.outliers,
        "PICK": False,
        "CHUNK": 128,
        "LOW": True,
        "HIGH": True,
        "LEVELS": (7.0, 127.0),
        "SIZE": layout.COLUMNS,
    }
    constants = {name: each for name, each in (constants | case.more).items() if name in names}
    signature: dict[str, Any] = {
        "w": types(case),
        "looks": "*i16",
        "x": "*i8" if case.kernel == "multiply_whole" else f"*{case.dtype}",
        **dict.fromkeys(("given", "y", "bias"), f"*{case.dtype}"),
        **dict.fromkeys(("parts", "scales", "sensitivity"), "*fp32"),
        **dict.fromkeys(("picked", "order", "source", "band_of", "counters", "columns"), "*i32"),
        "sums": "*i32",
        **dict.fromkeys(("unit", "inverse", "threshold"), "fp32"),
        "codes": "*i8",
    }
    ordered = {
        name: "constexpr" if name in constants else signature.get(name, "i32") for name in names
    }
    aligned: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(names):
        if name == "w":
            aligned |= {
                (place, each): [["tt.divisibility", 16]] for each in range(len(types(case)))
            }
        elif ordered[name] not in ("constexpr", "fp32") and name not in ("tokens", "bands"):
            aligned[place,] = [["tt.divisibility", 16]]
    fixed = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, ordered, fixed, aligned)


def compiled(task: tuple[Case, int]) -> dict[str, Any]:
    """Compile for an architecture and count."""
    case, architecture = task
    options = {"num_warps": DECODE_WARPS if case.kernel == "decode" else 4}
    if case.kernel == "multiply":
        options |= limits(architecture // 10, case.kinds, case.tokens)
    made = triton.compile(source(case), GPUTarget("cuda", architecture, 32), options)
    ptx = made.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    old = (
        case.tokens < 16
        or eights(case)
        or (case.kernel == "multiply_whole" and architecture == 100)
    )
    core = TENSOR_CORE[80 if old else architecture]
    registers, spilled, code = assembled(ptx, architecture)
    turns = sorted(loops(code))[-max(1, len(case.kinds)) :]
    return {
        "case": case,
        "architecture": architecture,
        "copies": count(r"cp\.async\.c[ag]\.shared\.global[^;]*0x10"),
        "core": core,
        "tensor": count(core),
        "counted": count(r"atom\.global\.gpu\.acq_rel\.add"),
        "registers": registers,
        "spilled": spilled,
        "shared": made.metadata.shared,
        "converted": count(r"cvt\.rn[a-z.]*\.(f16|bf16)\.") + count(r"cvt\.rn\.f32\.[su]"),
        "torn": torn(made.asm["ttgir"]),
        "coarse": coarse(ptx),
        "instructions": max(turns, default=0) / WEIGHTS_A_THREAD / case.more.get("UNROLL", 1),
    }


def assembled(ptx: str, architecture: int) -> tuple[int, int, str]:
    """Return a thread's registers, the bytes that it spills, and the GPU's code."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "kernel.ptx"
        source.write_text(ptx)
        binary = str(source.with_suffix(".cubin"))
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        tool = knobs.nvidia.ptxas_blackwell if architecture >= 100 else knobs.nvidia.ptxas
        command = [tool.path, "-v", f"--gpu-name={name}", str(source), "-o", binary]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [knobs.nvidia.nvdisasm.path, "-c", binary]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stores, loads = re.findall(r"(\d+) bytes spill", said)
    return int(re.findall(r"Used (\d+) registers", said)[0]), int(stores) + int(loads), code


def loops(code: str) -> Iterator[int]:
    """Count the instructions of each turn of each loop: from a label to a branch back to it."""
    labels: dict[str, int] = {}
    number = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = number
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s+\S", line):
            number += 1
            back = re.search(r"BRA.*`\((\.L\w+)\)", line)
            if back and back[1] in labels:
                yield number - labels[back[1]]


def faults(found: dict[str, Any]) -> Iterator[str]:
    """Say what is not as it must be."""
    case, architecture = found["case"], found["architecture"]
    if found["spilled"]:
        yield f"{found['spilled']} bytes are spilled"
    if found["shared"] > SHARED_MEMORY[architecture]:
        yield "too much shared memory"
    if found["torn"]:
        yield f"{found['torn']} pairs are taken apart"
    if found["coarse"]:
        yield "float32 is rounded to TF32"
    if case.kernel.startswith("multiply"):
        yield from faults_of_products(case, architecture, found)


def faults_of_products(case: Case, architecture: int, found: dict[str, Any]) -> Iterator[str]:
    """Say what else is not as it must be in a product."""
    if found["copies"] < len(case.kinds):
        yield "weights do not come by copies of 16 bytes"
    if not found["counted"]:
        yield "programs that share a panel are not told of each other's sums"
    if not found["tensor"] and case.dtype != "fp32":
        yield f"no {found['core']}"
    results = case.tokens // 2  # of a thread, which are converted too
    if not case.converts and found["converted"] >= WEIGHTS_A_THREAD * len(case.kinds) + results:
        yield "codes are converted one by one"
    if case.most and architecture < 100 and found["instructions"] > case.most:
        yield f"more than {case.most} instructions a weight"


def main() -> int:
    """Compile, print a row for each, and fail where a row is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", default="80,90,100")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    architectures = [int(each) for each in options.architectures.split(",")]
    tasks = [(case, architecture) for case in CASES for architecture in architectures]
    failed = False
    with ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(compiled, tasks):
            wrong = list(faults(found))
            failed = failed or bool(wrong)
            verdict = "MISS" if wrong else "ok  "
            print(
                f"{verdict} {found['case'].name:33} sm_{found['architecture']:<4}"
                f"copies of 16 bytes {found['copies']:3}, tensor {found['tensor']:3}, "
                f"conversions {found['converted']:3}, "
                f"instructions a weight {found['instructions']:4.1f}, "
                f"registers {found['registers']:3}, "
                f"shared {found['shared'] / 1024:5.1f} KiB  {'; '.join(wrong)}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
