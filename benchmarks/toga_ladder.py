"""The ladder of the paper's table 3: what each step of W4A4 brings, one after the other.

Weights and activations in 4 bits, rounded to nearest; one weight in eight, and what it is
multiplied with, in 8 bits; in_channels sorted; GPTQ; keys and values in 4 bits.  The paper's steps
lie at 1753, 6.03, 5.78, 5.38 and 5.48 (Llama-2-7B, 16 bits: 5.12); here the same steps are taken on
a model of 5.8 M parameters, whose tiles have 32 in_channels so that one in eight exists at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from bitmosaic.methods.toga import PRESETS, Toga
from toga_bench import Bench

Row = dict[str, Any]
Measure = Callable[[], Row]
Check = tuple[str, float, float, bool]

SHARE = 0.125
"""Of the weights in 8 bits."""
TILE = 32
_MODE = {"mode": "weight+activation", "tile_in": TILE}
_ALL = {**_MODE, "formats": PRESETS["w4a4"][:1], "base": "nearest", "reorder": "none"}
_SOME = {**_ALL, "formats": PRESETS["w4a4"]}
_SORTED = {**_SOME, "reorder": "gain"}
RUNGS: dict[str, dict[str, Any]] = {
    "W4A4, nearest": _ALL,
    "+ 12.5 % INT8": _SOME,
    "+ reorder": _SORTED,
    "+ GPTQ": {**_SORTED, "base": "gptq"},
    "+ KV INT4": {**_SORTED, "base": "gptq"},
}
APART = "GPTQ, weights alone"
"""The same weights' bands with activations in 16 bits: what is left is theirs."""

LEARNED = "+ GPTQ, bands learned"
"""As + GPTQ, but which channels have 8 bits is learned with inputs rounded, against the loss."""


def rows(bench: Bench) -> Iterator[tuple[Row, Measure]]:
    """List the rungs: settings, and how each is measured."""
    yield {"name": "16 bits"}, bench.original
    for name, parameters in RUNGS.items():
        yield {"name": name, "tile_in": TILE, "share": SHARE}, _measure(bench, name, parameters)
    learned = {**RUNGS["+ GPTQ"], "search": "learned"}
    yield {"name": LEARNED, "tile_in": TILE, "share": SHARE}, _measure(bench, LEARNED, learned)
    alone = {**RUNGS["+ GPTQ"], "mode": "weight-only", "shared": True}
    yield {"name": APART, "tile_in": TILE, "share": SHARE}, _measure(bench, APART, alone)


def _measure(bench: Bench, name: str, parameters: dict[str, Any]) -> Measure:
    def measure() -> Row:
        method = Toga(**parameters)
        share = SHARE if len(method.formats) > 1 else 1.0
        kv = "int4" if "KV" in name else "exact"
        return bench.measure(method, bench.budget(method, share), kv=kv)

    return measure


def line(row: Row) -> str:
    """Print a row."""
    return (
        f"  {row['name']:20} {row['bits_per_weight']:7.4f} bits, {row['salient_share']:6.2%} INT8  "
        f"ppl {row['perplexity']:9.4f} kl {row['kl']:.5f}"
    )


def checks(found: list[Row]) -> list[Check]:
    """Every step lowers the KL, but for the last, which costs less than the second one brings."""
    table = {row["name"]: row for row in found}
    judged = []
    names = list(RUNGS)[:-1]
    for before, after in itertools.pairwise(names):
        if before in table and after in table:
            ours, limit = table[after]["kl"], table[before]["kl"]
            judged.append((f"KL of {after} against the step before", ours, limit, ours < limit))
    if {"+ KV INT4", "+ 12.5 % INT8"} <= table.keys():
        ours, limit = table["+ KV INT4"]["kl"], table["+ 12.5 % INT8"]["kl"]
        judged.append(("KL with KV INT4 against + 12.5 % INT8", ours, limit, ours < limit))
    if {"+ GPTQ", LEARNED} <= table.keys():
        ours, limit = table[LEARNED]["kl"], table["+ GPTQ"]["kl"]
        judged.append(("KL with bands learned against + GPTQ", ours, limit, ours <= limit))
    for name in names[1:]:
        if name in table:
            off = abs(table[name]["salient_share"] - SHARE)
            judged.append((f"share of INT8 off 12.5 %, {name}", off, 0.01, off <= 0.01))
    return judged
