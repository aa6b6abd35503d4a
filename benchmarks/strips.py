"""FGMP's tiles of 16 in the CPU kernels: `kernel.py --parts fgmp`.

Shares of FP4 tiles from none to all, at random places, against the machine's limits, against the
usual 4-bit integers and FP8, and with a rule for activations, whose cost is also timed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bitmosaic.activations import HIGH, LOW, ActivationRule
from bitmosaic.backends.cpu import round_activations
from contenders import Call, Contender, Ours, inputs, plan
from figures import at_least, at_most
from matrices import random_tensor
from probes import Probes

SHAPES = ((4096, 4096), (4096, 14336))
SHARES = (0.0, 0.5, 0.7, 0.9, 1.0)
RULED = 0.7
BATCHES = (1, 16, 512)

Rows = list[dict[str, Any]]


class FloatPeak:
    """The probe of float32 multiply-adds as a contender."""

    name = "float probe"
    nbytes = 0

    def __init__(self, probes: Probes) -> None:
        self._probes = probes

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call, which tells its own seconds for as much work as one product's."""
        return [lambda: self._probes.multiply_floats(threads)]


class RuleAlone:
    """Rounding activations, nothing multiplied."""

    name = "rule alone"
    nbytes = 0

    def __init__(self, width: int, rule: ActivationRule) -> None:
        self._width, self._rule = width, rule

    def calls(self, batch: int, threads: int) -> list[Call]:
        """Return one call for each of two inputs."""
        return [
            lambda x=x: round_activations(x, self._rule)  # type: ignore[misc]
            for x in inputs(batch, self._width)
        ]


def measure_strips(
    shapes: Iterable[tuple[int, int]],
    threads: list[int],
    quick: bool,
    *,
    run: Callable[..., Any],
    reading: Callable[[Probes], Contender],
) -> Rows:
    """Time and judge; `run` and `reading` are those of kernel.py, whose shapes are not used."""
    probes, rows = Probes(), []
    for shape in SHAPES[:1] if quick else SHAPES:
        rule = _rule(shape[1])
        for batch in BATCHES:
            how = plan(batch, quick)
            copies = 2 * how.copies if batch == 1 else 2
            group = [*_ours(shape, copies, rule), RuleAlone(shape[1], rule)]
            group += [reading(probes)] if batch == 1 else [FloatPeak(probes)]
            for count in threads:
                result = run(group, shape, count, batch, how, rows)
                rows += _judge(result, batch, count, probes)
    return rows


def _rule(width: int) -> ActivationRule:
    """Make a rule by which about half of the tiles of normal activations become FP4."""
    x, worth = inputs(64, width)[0], torch.ones(width)
    rule = ActivationRule((LOW, HIGH), float(x.abs().max()) / 2688, float("inf"), worth)
    u = x.unflatten(1, (-1, 16)) / rule.tensor_scale
    low = round_activations(x, rule).values.view(u.shape)
    high = ActivationRule((HIGH,), rule.tensor_scale)
    apart = low - round_activations(x, high).values.view(u.shape)
    middle = float(apart.square().sum(-1).median())
    return ActivationRule((LOW, HIGH), rule.tensor_scale, middle, worth)


def _ours(shape: tuple[int, int], copies: int, rule: ActivationRule) -> list[Contender]:
    found: list[Contender] = []
    for share in SHARES:
        mix = {LOW: share, HIGH: 1 - share}
        mix = {name: part for name, part in mix.items() if part > 0}
        tensor = random_tensor(shape, mix, tile=(1, 16))
        found.append(Ours(f"fgmp {share}", tensor, copies))
        if share == RULED:
            found.append(Ours(f"fgmp {share} + rule", tensor.with_activations(rule), copies))
    found.append(Ours("int4", random_tensor(shape, {"int4-g128": 1}), copies))
    wide = random_tensor(shape, {HIGH: 1})
    found.append(Ours("fp8", wide, copies, activations="exact"))
    return found


def _judge(result: Any, batch: int, threads: int, probes: Probes) -> Rows:
    timed, rows = result.timed, []
    what = f"{result.shape}, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    middle = timed[f"fgmp {RULED}"]
    if batch == 1:
        for share in SHARES:
            each = timed[f"fgmp {share}"].bandwidth / timed["read probe"].bandwidth
            asked = 0.7 if share == RULED else 0.0
            rows.append(at_least(f"{what}, fgmp {share}: share of the read bandwidth", each, asked))
    elif probes.floats:
        peak = probes.float_operations * threads / timed["float probe"].seconds
        each = middle.speed / peak
        asked = 0.8 if batch == 512 else 0.0
        rows.append(at_least(f"{what}, fgmp {RULED}: share of the float peak", each, asked))
    ruled = timed[f"fgmp {RULED} + rule"].seconds / middle.seconds - 1
    alone = timed["rule alone"].seconds / middle.seconds
    limit = {1: 0.05, 16: 0.05, 512: 0.03}[batch]
    rows.append(
        at_most(f"{what}, rule: more time than without", ruled, limit, details={"alone": alone})
    )
    for other in ("int4", "fp8"):
        ratio = middle.seconds / timed[other].seconds
        rows.append(at_most(f"{what}, fgmp {RULED}: time over {other}", ratio, float("inf")))
    speed = batch / timed["rule alone"].seconds
    rows.append(at_least(f"{what}, rule alone", speed, 0.0, "tokens/s"))
    return rows
