"""What the GPU kernels reach: share of the memory's rate, and against bfloat16 matrices.

    python benchmarks/gpu.py [--parts PART,PART] [--tune] --json OUT

Needs an NVIDIA GPU; under eight minutes.  Every figure is printed beside what is asked; the exit
code is 1 where one is missed.  The parts: correct, one, others, few, many, mixed, decode, quantize.

First products of small weights of every kind are compared with float64, within the rounding of
their types.  Then times: each is a CUDA graph that goes round copies of the weights (they are not
in the cache: more than 256 MB of them), the best of some rounds, in which what is compared takes
turns.  The memory's rate is the better of a copy and a sum of 2 GiB, in the same run.

`decode` is all matrices of one token of Llama 3.1 8B's geometry in one graph (32 blocks and the
head; q, k and v by one launch, gate and up too), without attention and norms, which are the same on
both sides.  `quantize` is of gpu_quantize.py.  `--tune` tries sizes of the kernels for each shape
first, and writes what is best for this device to `tuned.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import gpu_quantize
from bitmosaic import backends
from bitmosaic.allocation import LayerAllocation
from bitmosaic.backends._triton import choices
from bitmosaic.backends._triton.choices import Choice
from bitmosaic.rounding import nearest
from bitmosaic.tensor import QuantizedTensor
from figures import ROOT, at_least, finish
from matrices import CHANNELS_3, MIX_2, MIX_3, MIX_4, TILE, Mix, random_tensor

BACKEND = backends.get("triton")
TUNED = ROOT / "src/bitmosaic/backends/_triton/tuned.json"
HIDDEN, INNER, KEYS, VOCABULARY, BLOCKS = 4096, 14336, 1024, 128256, 32
LARGE = (INNER, HIDDEN)
"""Packed at 3.25 bits this is 25 MB."""
COLD = 256 << 20
ROUNDS = 20
MIXES: dict[str, Mix] = {
    "int2": {"int2-g128": 1.0},
    "2.5 bits mixed": MIX_2,
    "3.25 bits mixed": MIX_3,
    "int3": {"int3-g128": 1.0},
    "4.3 bits mixed": MIX_4,
    "int4": {"int4-g128": 1.0},
}
OTHERS: dict[str, tuple[Mix, tuple[int, int]]] = {
    "int4 in groups of 32": ({"int4-g32": 1.0}, (64, 128)),
    "nvfp4": ({"nvfp4": 1.0}, (64, 128)),
    "mxfp4": ({"mxfp4": 1.0}, (64, 128)),
    "codebooks of 3 bits by channel": (CHANNELS_3, (INNER, 1)),
    "nvfp4 and fp8 blocks": ({"nvfp4": 0.7, "fp8-e4m3-tensor": 0.3}, (1, 16)),
    "fp8": ({"fp8-e4m3-tensor": 1.0}, (64, 128)),
}
"""Formats with small groups, tables or blocks: those below five bits first."""
KINDS: dict[str, tuple[Mix, tuple[int, int]]] = {
    "every width": ({f"int{bits}-g128": 1.0 for bits in (1, 2, 3, 4, 8)}, (64, 128)),
    "pruned beside int4": ({"int4-g128": 1.0, "pruned": 1.0}, (64, 128)),
    "groups of 32": ({"int3-g32": 1.0, "int4-g32": 1.0}, (64, 128)),
    "fp8": ({"fp8-e4m3-tensor": 1.0}, (64, 128)),
    "nvfp4": ({"nvfp4": 1.0}, (64, 128)),
    "nvfp4 and fp8 blocks": ({"nvfp4": 0.7, "fp8-e4m3-tensor": 0.3}, (1, 16)),
    "mxfp4": ({"mxfp4": 1.0}, (64, 128)),
    "codebooks by channel": (CHANNELS_3, (512, 1)),
    "codebooks by tile": ({"codebook2": 1.0, "codebook3": 1.0, "codebook4": 1.0}, (64, 128)),
    "codebook1 by channel": ({"codebook1": 1.0}, (512, 1)),
    "bf16": ({"bf16": 1.0}, (64, 128)),
}

Rows = list[dict[str, Any]]


def best(works: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Capture each list of calls as a graph, and return the seconds of one call by name."""
    graphs, times = {}, {name: [] for name in works}
    for name, calls in works.items():
        for call in calls:  # compiles, and fills caches of constants
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / 1000 / len(works[name]))
    return {name: min(each) for name, each in times.items()}


def memory_rate() -> float:
    """Bytes a second of a copy or a sum, whichever is more."""
    data = torch.empty(1 << 29, dtype=torch.float32, device="cuda").normal_()
    other = torch.empty_like(data)
    found = best({"copy": [lambda: other.copy_(data)], "sum": [lambda: data.sum()]})
    return max(2 * data.nbytes / found["copy"], data.nbytes / found["sum"])


class Contender:
    """Copies of a packed weight, enough to be cold, and the same products of a dense one."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        first = BACKEND.prepare(tensor.to("cuda"))
        self.nbytes = first.nbytes
        count = max(1, min(64, -(-COLD // first.nbytes)))
        self.packed = [first, *(BACKEND.prepare(tensor.to("cuda")) for _ in range(count - 1))]
        out, width = tensor.shape
        dense = max(1, min(8, -(-COLD // (2 * out * width))))
        self.dense = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(dense)]
        self.width = width

    def ours(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """List the products by the packed copies."""
        return [lambda each=each: BACKEND.linear(x, each) for each in self.packed]

    def theirs(self, x: Tensor) -> list[Callable[[], Tensor]]:
        """List the products by the dense ones."""
        return [lambda each=each: functional.linear(x, each) for each in self.dense]

    def inputs(self, tokens: int) -> Tensor:
        """Draw inputs of so many tokens."""
        return torch.randn(tokens, self.width, device="cuda").bfloat16()


def correct() -> Iterator[dict[str, Any]]:
    """Compare products of all kinds with float64: the largest error over its bound."""
    for (name, (mix, tile)), tokens in itertools.product(KINDS.items(), (1, 5, 17, 40, 300)):
        generator = torch.Generator().manual_seed(0)
        shares, grid = torch.tensor([*mix.values()]), (-(-512 // tile[0]), -(-1024 // tile[1]))
        drawn = torch.multinomial(shares, grid[0] * grid[1], True, generator=generator)
        layer = LayerAllocation((512, 1024), tile, tuple(mix), drawn.view(grid).to(torch.uint8))
        tensor = nearest(torch.randn(512, 1024, generator=generator), layer).to("cuda")
        prepared, weight = BACKEND.prepare(tensor), tensor.dequantize().double()
        worst = 0.0
        every = tokens in (1, 300)  # each type is a compilation
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if every else 1]:
            x = torch.randn(tokens, 1024, device="cuda").to(dtype)
            y = BACKEND.linear(x, prepared)
            again = BACKEND.linear(x, prepared)
            exact, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
            unit = torch.finfo(dtype).eps / 2
            bound = (unit + 4 * 1024**0.5 * 2.0**-24) * size + unit * exact.abs() + 2.0**-24
            error = (y.double() - exact).abs() / bound
            known = bool(error.isfinite().all()) and torch.equal(y, again)
            worst = max(worst, float(error.max())) if known else float("inf")
        yield at_least(f"bound over error, {name}, {tokens} tokens", 1 / max(worst, 1e-9), 1.0)
    yield together()


def together() -> dict[str, Any]:
    """Compare weights that lie together with each by itself."""
    weights = [random_tensor(shape, MIX_3).to("cuda") for shape in ((512, 1024), (320, 1024))]
    merged, parts = BACKEND.merge([BACKEND.prepare(weight) for weight in weights])
    x = torch.randn(3, 1024, device="cuda").bfloat16()
    pairs = zip(BACKEND.linears(x, merged, None), parts, strict=True)
    close = [torch.allclose(y, BACKEND.linear(x, part), rtol=0.02, atol=0.02) for y, part in pairs]
    return at_least("weights that lie together: share that is right", sum(close) / 2, 1.0)


def one() -> Iterator[dict[str, Any]]:
    """One token: the share of the memory's rate at which prepared bytes are read."""
    yield from shares_of_memory({name: (mix, TILE) for name, mix in MIXES.items()})


def others() -> Iterator[dict[str, Any]]:
    """The same of formats with small groups, tables or blocks."""
    yield from shares_of_memory(OTHERS)


def shares_of_memory(weights: dict[str, tuple[Mix, tuple[int, int]]]) -> Iterator[dict[str, Any]]:
    """Multiply one token by each of some weights."""
    rate = memory_rate()
    for name, (mix, tile) in weights.items():
        contender = Contender(random_tensor(LARGE, mix, tile=tile))
        x = contender.inputs(1)
        found = best({"ours": contender.ours(x), "theirs": contender.theirs(x)})
        reached = contender.nbytes / found["ours"]
        details = {
            "gb_per_s": reached / 1e9,
            "memory_gb_per_s": rate / 1e9,
            "microseconds": found["ours"] * 1e6,
            "bf16_over_ours": found["theirs"] / found["ours"],
        }
        yield at_least(f"one token, {name}: share of the memory's rate", reached / rate, 0.7,
                       "x", details)  # fmt: skip


def few() -> Iterator[dict[str, Any]]:
    """16 to 64 tokens at 3.25 bits against bfloat16."""
    contender = Contender(random_tensor(LARGE, MIX_3))
    for tokens in (16, 32, 64):
        x = contender.inputs(tokens)
        found = best({"ours": contender.ours(x), "theirs": contender.theirs(x)})
        over = found["theirs"] / found["ours"]
        yield at_least(f"{tokens} tokens, 3.25 bits: bf16 over ours", over, 2.5)


def many() -> Iterator[dict[str, Any]]:
    """From 512 tokens on, against bfloat16."""
    contender = Contender(random_tensor(LARGE, MIX_3))
    for tokens in (512, 2048):
        x = contender.inputs(tokens)
        found = best({"ours": contender.ours(x), "theirs": contender.theirs(x)})
        yield at_least(f"{tokens} tokens: bf16 over ours", found["theirs"] / found["ours"], 0.9)


def mixed() -> Iterator[dict[str, Any]]:
    """A mixture against one width of the same bytes: 2 and 4 bits against 3."""
    half = Contender(random_tensor(LARGE, {"int2-g128": 0.5, "int4-g128": 0.5}))
    three = Contender(random_tensor(LARGE, MIXES["int3"]))
    x = half.inputs(1)
    found = best({"mixed": half.ours(x), "uniform": three.ours(x)})
    rates = half.nbytes / found["mixed"], three.nbytes / found["uniform"]
    yield at_least("one token: rate of half 2, half 4 bits over that of 3", rates[0] / rates[1],
                   0.95)  # fmt: skip


def decode() -> Iterator[dict[str, Any]]:
    """All matrices of a token, against bfloat16."""
    qkv, gate_up = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN)], [LARGE, LARGE]
    shapes = [*qkv, (HIDDEN, HIDDEN), *gate_up, (HIDDEN, INNER)]
    made = {shape: random_tensor(shape, MIX_3).to("cuda") for shape in {*shapes}}
    head = BACKEND.prepare(random_tensor((VOCABULARY, HIDDEN), MIX_4).to("cuda"))
    groups, packed = [], []
    for _ in range(BLOCKS):
        for members in (qkv, shapes[3:4], gate_up, shapes[6:]):
            weights = [BACKEND.prepare(made[shape]) for shape in members]
            together, parts = BACKEND.merge(weights) if len(weights) > 1 else (None, weights)
            groups.append((together, *parts))
            packed += parts
    groups.append((None, head))
    packed.append(head)
    sizes = [*shapes * BLOCKS, (VOCABULARY, HIDDEN)]
    dense = [torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for shape in sizes]
    inputs = {width: torch.randn(1, width, device="cuda").bfloat16() for width in (HIDDEN, INNER)}

    def ours() -> None:
        for together, weight, *_ in groups:
            if together is None:
                BACKEND.linear(inputs[weight.width], weight)
            else:
                BACKEND.linears(inputs[weight.width], together, None)

    def one_by_one() -> None:
        for each in packed:
            BACKEND.linear(inputs[each.width], each)

    def theirs() -> None:
        for each in dense:
            functional.linear(inputs[each.shape[1]], each)

    found = best({"ours": [ours], "theirs": [theirs], "one by one": [one_by_one]})
    held = [weight if together is None else together for together, weight, *_ in groups]
    details = {
        "milliseconds": found["ours"] * 1e3,
        "one_by_one_milliseconds": found["one by one"] * 1e3,
        "bf16_milliseconds": found["theirs"] * 1e3,
        "gb": sum(each.nbytes for each in held) / 1e9,
    }
    over = found["theirs"] / found["ours"]
    yield at_least("matrices of a token of 8B: bf16 over ours", over, 2.5, "x", details)


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "correct": correct,
    "one": one,
    "others": others,
    "few": few,
    "many": many,
    "mixed": mixed,
    "decode": decode,
    "quantize": gpu_quantize.rows,
}


def tune() -> None:
    """Try sizes for small, middling and large weights; keep the best of each number of tokens."""
    entries = []
    for cells in ((HIDDEN, HIDDEN), LARGE, (VOCABULARY, HIDDEN)):
        contender = Contender(random_tensor(cells, MIX_3))
        for tokens in (1, 8, 16, 32, 64, 128, 256, 512):
            x = contender.inputs(tokens)
            seconds: dict[Choice, float] = {}
            for choice in shares(tokens):
                seconds[choice] = timed(contender, x, choice)
            for choice in depths(min(seconds, key=seconds.__getitem__)):
                seconds[choice] = timed(contender, x, choice)
            chosen = min(seconds, key=seconds.__getitem__)
            print(f"     {cells} {tokens}: {chosen}, {seconds[chosen] * 1e6:.1f} us", flush=True)
            entries.append({
                "most_tokens": tokens,
                "most_cells": cells[0] // 64 * (cells[1] // 128),
                "choice": chosen.described(),
            })  # fmt: skip
    largest = max(entry["most_cells"] for entry in entries)
    for entry in entries:
        entry["most_cells"] = 1 << 40 if entry["most_cells"] == largest else entry["most_cells"]
    tables = json.loads(TUNED.read_text())
    tables[torch.cuda.get_device_properties(0).name] = entries
    TUNED.write_text(json.dumps(tables, indent=1) + "\n")


def timed(contender: Contender, x: Tensor, choice: Choice) -> float:
    """Return the seconds of a product with these sizes; infinite where they do not fit."""
    choices.choose = lambda *shape: choice
    try:
        return best({"ours": contender.ours(x)[:16]})["ours"]
    except Exception as error:  # out of shared memory: no choice
        print(f"     {choice}: {error}")
        return float("inf")


def shares(tokens: int) -> Iterator[Choice]:
    """List sizes that differ in how the work is shared among programs."""
    natural = next((size for size in (8, 16, 32, 64) if tokens <= size), 128)
    for size in sorted({natural, max(8, natural // 2)}):
        for parts in (1, 2, 4, 8, 16):
            yield Choice(size, parts, unroll=2 if size == 8 else 1)
    yield Choice(128, 1, dense=True)


def depths(choice: Choice) -> Iterator[Choice]:
    """List sizes that differ in how far a program looks ahead."""
    if not choice.dense:
        for stages, unroll in itertools.product((2, 3, 4, 6), (1, 2)):
            yield replace(choice, stages=stages, unroll=unroll)


def main() -> int:
    """Measure, print each figure beside what is asked, and say by the exit code if one missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tune", action="store_true", help="choose sizes for this device first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: an NVIDIA GPU must be there to be measured, but torch finds none. "
              "`make kernels` tests the kernels without one.", file=sys.stderr)  # fmt: skip
        return 2
    if options.tune:
        chosen = choices.choose
        tune()
        choices.choose = chosen
        choices._tables.cache_clear()
    rows = [row for part in options.parts.split(",") for row in PARTS[part]()]
    name = torch.cuda.get_device_properties(0).name
    return finish(rows, options.json, device=name)


if __name__ == "__main__":
    sys.exit(main())
