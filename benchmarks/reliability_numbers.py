"""Hostile numbers: weights and inputs that no model should have, shapes that nothing divides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reliability_kit as kit
from bitmosaic import backends, methods
from bitmosaic.allocation import LayerAllocation, uniform
from bitmosaic.api.measure import generate
from bitmosaic.checkpoint import validate
from bitmosaic.methods.base import LayerStatistics
from bitmosaic.rounding import nearest
from bitmosaic.tensor import QuantizedTensor
from figures import at_least, at_most

SHAPES = ((1, 1), (1, 7), (5, 1), (1, 130), (17, 33), (3, 257))
TINY = torch.finfo(torch.float32).smallest_normal
HUGE = torch.finfo(torch.float32).max


def _spread(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _one(value: float) -> Callable[[tuple[int, int]], Tensor]:
    def make(shape: tuple[int, int]) -> Tensor:
        weight = _spread(shape)
        weight[-1, -1] = value
        return weight

    return make


def _zero_channels(shape: tuple[int, int]) -> Tensor:
    weight = _spread(shape)
    weight[::2], weight[:, ::3] = 0, 0
    return weight


WEIGHTS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "usual": _spread,
    "zero": lambda shape: torch.zeros(shape),
    "zero channels": _zero_channels,
    "subnormal": lambda shape: _spread(shape) * TINY / 8,
    "smallest": lambda shape: torch.full(shape, 2.0**-149),
    "huge": lambda shape: _spread(shape).sign() * HUGE,
    "all equal": lambda shape: torch.full(shape, -3.0),
    "of 76 binades": lambda shape: torch.exp2(torch.linspace(-126, 127, shape[0] * shape[1])).view(
        shape
    ),
    "one huge": _one(HUGE),
    "one subnormal": _one(TINY / 2),
}
INPUTS: dict[str, Callable[[int], Tensor]] = {
    "zero": lambda width: torch.zeros(3, width),
    "subnormal": lambda width: torch.full((3, width), TINY / 4),
    "huge": lambda width: torch.full((3, width), HUGE),
    "NaN in one token": lambda width: _in_token(width, float("nan")),
    "infinity in one token": lambda width: _in_token(width, float("inf")),
    "no tokens": lambda width: torch.ones(0, width),
    "no samples": lambda width: torch.ones(0, 4, width),
}
FORMATS = (
    *("int1", "int2-g16", "int4-g16", "int8-sym", "fp8-e4m3-g16", "nvfp4", "mxfp4"),
    *("codebook3", "bf16", "pruned"),
)


def _in_token(width: int, value: float) -> Tensor:
    x = torch.ones(3, width)
    x[1, width // 2] = value
    return x


class Numbers:
    """What was tried, and what was wrong."""

    def __init__(self) -> None:
        self.tried, self.refused = 0, 0
        self.wrong: list[str] = []

    def packed(self, what: str, make: Callable[[], QuantizedTensor]) -> QuantizedTensor | None:
        """Make a packed weight: finite and valid, or refused in a sentence."""
        self.tried += 1
        try:
            tensor = make()
            validate("w", tensor)
            if not bool(tensor.dequantize().isfinite().all()):
                raise AssertionError("decodes to what is not finite")
        except ValueError as error:
            self.refused += 1
            if "must" not in str(error):
                self.wrong.append(f"{what}: {error}")
            return None
        except Exception as error:
            self.wrong.append(f"{what}: {type(error).__name__} {error}")
            return None
        return tensor

    def multiplied(self, what: str, tensor: QuantizedTensor, x: Tensor) -> None:
        """Multiply on every backend: tokens with finite inputs do not see the others."""
        for name, activations in itertools.product(backends.names(), backends.ACTIVATIONS):
            backend = backends.get(name)
            if backend.objection(tensor, torch.device("cpu")) is not None:
                continue
            self.tried += 1
            y = backend.linear(x, backend.prepare(tensor), activations=activations)
            good = x.isfinite().all(-1)
            clean = x.masked_fill(~good[..., None], 1.0)
            alone = backend.linear(clean, backend.prepare(tensor), activations=activations)
            same = torch.equal(y[good].nan_to_num(), alone[good].nan_to_num())
            if y.shape != (*x.shape[:-1], tensor.shape[0]) or not same:
                self.wrong.append(f"{what} on {name}, {activations}")


def run(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Try the numbers; rows for reliability.py."""
    numbers = Numbers()
    shapes = SHAPES[::4] if quick else SHAPES
    names = FORMATS[::3] if quick else FORMATS
    for shape, (kind, make), name in itertools.product(shapes, WEIGHTS.items(), names):
        weight, plan = make(shape), uniform(shape, name)
        what = f"{kind} weights {shape} as {name}"
        tensor = numbers.packed(what, lambda weight=weight, plan=plan: nearest(weight, plan))
        if tensor is None:
            continue
        for label, inputs in INPUTS.items():
            numbers.multiplied(f"{what}, {label} inputs", tensor, inputs(shape[1]))
    for shape, (kind, make), base in itertools.product(shapes, WEIGHTS.items(), ("gptq", "awq")):
        weight = make(shape)
        for label, inputs in _inputs(shape[1]).items():
            what = f"{kind} weights {shape} by {base}, {label} inputs"
            numbers.packed(what, lambda w=weight, x=inputs, b=base: _rounded(w, x, b))
    models, odd = _models(parent, quick)
    wrong = [*numbers.wrong, *odd]
    for text in wrong[:40]:
        print(f"     WRONG {text[:300]}")
    details = {"refused": numbers.refused}
    return [
        at_least(
            "numbers: matrices and products of hostile numbers",
            numbers.tried,
            500,
            "cases",
            details,
        ),
        at_least(
            "numbers: models whose sizes nothing divides", models, 2 if quick else 16, "models"
        ),
        at_most("numbers: wrong results, other errors", len(wrong), 0, ""),
    ]


def _inputs(width: int) -> dict[str, Tensor]:
    """Return what calibration may see of a matrix's inputs, tokens [8, width]."""
    usual = _spread((8, width))
    dead = usual.clone()
    dead[:, ::2] = 0
    return {
        "usual": usual,
        "zero": torch.zeros(8, width),
        "dead": dead,
        "subnormal": usual * TINY,
        "huge": usual * 1e18,
    }


def _rounded(weight: Tensor, inputs: Tensor, base: str) -> QuantizedTensor:
    """Round by a base that weighs errors by inputs."""
    method = methods.get("sfmp")(formats=("int4-g16",), base=base)
    hessian = inputs.t() @ inputs
    statistics = LayerStatistics(hessian, inputs.abs().mean(0))
    plan: LayerAllocation = uniform((weight.shape[0], weight.shape[1]), "int4-g16")
    return method.quantize("w", weight, plan, statistics)


def _models(parent: Path, quick: bool) -> tuple[int, list[str]]:
    """Quantize models of odd sizes by every method, and let them speak."""
    wrong, done = [], 0
    sizes = {"vocab_size": 97, "intermediate_size": 43}
    narrow = {"hidden_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    for number, changes in enumerate((sizes, {**sizes, **narrow})):
        made = kit.make_kit(parent / f"odd{number}", "llama", **changes)
        for method in list(kit.QUANTIZE)[: 1 if quick else None]:
            command = kit.quantizing(made, method)
            with kit.fresh(command, parent) as place:
                ended = kit.child(command.line(place))
                if ended.code == 0:
                    found = generate(place / "out", "一", tokens=3)
                    done += found.tokens > 0 or found.text == ""
                elif ended.code == 2 and "must be between" in ended.said:
                    done += 1  # the budget has no place among so few weights, which is said
                else:
                    wrong.append(f"{method} of {changes}: {ended.said[-300:]}")
    return done, wrong
