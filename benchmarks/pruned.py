"""What pruning saves on the CPU: narrower matrices and tiles of 0 bits, against none at equal bits.

    python benchmarks/pruned.py [--quick] [--threads 2] --json OUT

Every figure is printed beside what is asked; the exit code is 1 where one is missed.

A figure is the speed that pruning gains (0.5 for half as fast again), over the share of the weights
that it removes; asked is 0.8.  A stricter one is judged too, the share of the time saved over
that of the weights: 1 where a removed weight costs nothing, 0 where it costs as much as before.
Weights are those that the measured work multiplies by: one matrix; in decoding all of the model,
the head too, which has the same bits; in prefill those of the blocks, since the head sees one token
only.

First single matrices, with cold weights (kernel.py says how); then a model of Llama-3.2-1B's
geometry with random weights (model.py says how).  All variants are in memory together and take
many short turns.  Times are compared within a turn, and the median of the turns counts: the
machine's speed changes by a factor of two within minutes, and the best of many turns is luck.
`--quick` leaves the models out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import model
from bitmosaic.evaluation.generation import generate
from bitmosaic.evaluation.model import silence_loading
from bitmosaic.integrations.loading import load
from contenders import Ours, Plan, measure, p10, plan
from figures import at_least, finish
from matrices import Mix, random_tensor
from model_files import (
    BLOCKS,
    INNER,
    VOCABULARY,
    WIDTH,
    block_weights,
    write_packed,
)

FORMAT = "int4-g128"
TILE = (128, 128)
ASKED = 0.8
PROMPT, TOKENS, TURNS = 144, 8, 24
UP, DOWN = (INNER, WIDTH), (WIDTH, INNER)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """A way of pruning: the width of the MLPs, and the share of tiles of 0 bits."""

    name: str
    inner: int = INNER
    pruned: float = 0.0

    @property
    def mix(self) -> Mix:
        """Share of the tiles that each format gets."""
        return {FORMAT: 1 - self.pruned} | ({"pruned": self.pruned} if self.pruned else {})

    def narrow(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Cut the side of a matrix that is the MLP's width."""
        out, width = (self.inner if side == INNER else side for side in shape)
        return out, width

    def kept(self, shape: tuple[int, int]) -> float:
        """Share of a matrix's weights that are left."""
        out, width = self.narrow(shape)
        return (1 - self.pruned) * out * width / (shape[0] * shape[1])


VARIANTS = (
    Variant("unpruned"),
    Variant("MLPs 25 % narrower", inner=INNER * 3 // 4),
    Variant("MLPs 50 % narrower", inner=INNER // 2),
    Variant("a quarter of the tiles 0 bits", pruned=0.25),
    Variant("half of the tiles 0 bits", pruned=0.5),
)


def matrices(threads: int, quick: bool) -> Rows:
    """One matrix at a time: a token, and 512 at once."""
    rows: Rows = []
    for shape in (UP, DOWN):
        for batch in (1, 512):
            how = plan(1, quick) if batch == 1 else Plan(4 if quick else 16, 0, 1)
            contenders = [
                Ours(
                    each.name,
                    random_tensor(each.narrow(shape), each.mix, tile=TILE),
                    2 * how.copies,
                )
                for each in VARIANTS
            ]
            seconds = measure(contenders, batch, threads, how)
            title = f"{shape[0]}x{shape[1]}, {batch} token{'s' * (batch > 1)}, {threads} threads"
            rows += _judge(
                title,
                {name: p10(each) for name, each in seconds.items()},
                {each.name: 1 - each.kept(shape) for each in VARIANTS},
                {each.name: {"bytes": each.nbytes} for each in contenders},
            )
    return rows


def models(directory: Path, threads: int) -> Rows:
    """Whole models: bytes, loading, decoding, prefill."""
    facts: dict[str, dict[str, Any]] = {}
    for number, each in enumerate(VARIANTS):
        made = write_packed(
            _place(directory, number), each.mix, tile=TILE, inner=each.inner, embedding=FORMAT
        )
        loads = [model.in_child("load", _place(directory, number), threads) for _ in range(2)]
        facts[each.name] = made | min(loads, key=lambda load: load["load_seconds"])
        print(
            f"    {each.name:30} {made['packed_bytes'] / 1e6:5.0f} MB, blocks "
            f"{made['bits_per_weight']:.3f} bits, loaded in {facts[each.name]['load_seconds']:.2f} "
            f"s with {facts[each.name]['peak_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
    turns = speeds(directory, threads)
    whole = {"decode": block_weights() + VOCABULARY * WIDTH, "prefill": block_weights()}
    rows: Rows = []
    for what, weights in whole.items():
        removed = {
            each.name: (block_weights() - (1 - each.pruned) * block_weights(each.inner)) / weights
            for each in VARIANTS
        }
        plain = turns[what][VARIANTS[0].name]
        usual = statistics.median(plain)
        rows += _judge(
            f"{what}, {BLOCKS} blocks, {threads} threads",
            {
                name: usual * statistics.median(map(truediv, each, plain))
                for name, each in turns[what].items()
            },
            removed,
            {
                name: facts[name] | {"tokens_per_second": 1 / min(each)}
                for name, each in turns[what].items()
            },
        )
    return rows


def speeds(directory: Path, threads: int) -> dict[str, dict[str, list[float]]]:
    """Seconds a token of each variant, turn by turn: of a prompt, and of what follows."""
    torch.set_num_threads(threads)
    silence_loading()
    tokenizer = AutoTokenizer.from_pretrained(_place(directory, 0))
    loaded = {
        each.name: load(_place(directory, number), dtype=torch.float32, activations="int8")
        for number, each in enumerate(VARIANTS)
    }
    turns: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in loaded} for what in ("decode", "prefill")
    }
    for turn in range(TURNS + 1):
        for name, each in loaded.items():
            words = generate(each, tokenizer, "word", tokens=1 + TOKENS)
            prompt = generate(each, tokenizer, "word " * PROMPT, tokens=1)
            if turn:  # the first prepares
                turns["decode"][name].append(1 / words.tokens_per_second)
                turns["prefill"][name].append(prompt.prompt_seconds / prompt.prompt_tokens)
    return turns


def _judge(
    title: str,
    seconds: dict[str, float],
    removed: dict[str, float],
    details: dict[str, dict[str, Any]],
) -> Rows:
    """Set the time that each variant saves against the weights that it removes."""
    first = VARIANTS[0].name
    rows: Rows = []
    for name, each in seconds.items():
        found = {"seconds": each, "removed": removed[name], **details[name]}
        if name == first:
            print(f"    {title}: {1e3 * each:.3f} ms {name}", flush=True)
            rows.append({"contender": f"{title}: {name}", **found})
            continue
        saved, gained = 1 - each / seconds[first], seconds[first] / each - 1
        what = f"{title}, {name}: speed gained over weights removed"
        rows.append(at_least(what, gained / removed[name], ASKED, details=found))
        what = f"{title}, {name}: time saved over weights removed"
        rows.append(at_least(what, saved / removed[name], ASKED, details=found))
    return rows


def _place(directory: Path, number: int) -> Path:
    place = directory / str(number)
    place.mkdir(exist_ok=True)
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="single matrices only, few rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = matrices(given.threads, given.quick)
    if not given.quick:
        with tempfile.TemporaryDirectory() as directory:
            rows += models(Path(directory), given.threads)
    return finish(rows, given.json)


if __name__ == "__main__":
    raise SystemExit(main())
