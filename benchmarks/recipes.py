"""How far the public conventions of NVFP4 and MX are apart, in scales, codes and error.

    python benchmarks/recipes.py [--matrices 16] [--json OUT]

Each matrix is 1024 x 2048; weights are normal (standard deviation 0.02) in float32 and rounded to
bfloat16, and Student's t with two degrees of freedom in bfloat16. Compared are the bytes of scales
and the codes (a zero of either sign counts the same) with those of a first recipe, and the
root mean square error of the decoded weights, relative to that of the weights. A scale that
differs moves the codes of its whole group, which are counted too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmosaic import formats, recipes
from bitmosaic.formats.mxfp import ELEMENTS
from bitmosaic.recipes import Coded
from figures import finish

SHAPE = (1024, 2048)
OURS = "bitmosaic"
DRAWN = ("normal, fp32", "normal, bf16", "t2, bf16")


def weight(kind: str, seed: int) -> Tensor:
    """Draw one matrix."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(SHAPE, generator=generator)
    if kind.startswith("t2"):
        # A normal over the root of half a chi-squared of two degrees, which is exponential.
        drawn /= torch.empty(SHAPE).exponential_(generator=generator).sqrt()
    drawn *= 0.02
    return drawn.to(torch.bfloat16).float() if kind.endswith("bf16") else drawn


def code(values: Tensor, recipe: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Code a matrix by a recipe or by our format: codes, scales, decoded weights."""
    if recipe != OURS:
        coded: Coded = recipes.quantize(values, recipe, name)
        return coded.codes, coded.scales, coded.dequantize()
    fmt = formats.get(name)
    assert fmt.group is not None
    scale = fmt.tensor_scale(float(values.abs().max()))
    groups = (values / scale).unflatten(1, (-1, fmt.group))[None]
    parameters = fmt.fit(groups)
    codes = fmt.encode(groups, parameters)
    assert parameters.scale is not None
    stored = parameters.scale[0].to(torch.float8_e4m3fn).view(torch.uint8)
    return codes[0].flatten(1), stored, (fmt.decode(codes, parameters)[0] * scale).flatten(1)


def compare(kind: str, name: str, matrices: int) -> list[dict[str, Any]]:
    """Compare all recipes of a format with the first of them."""
    compared = (*recipes.recipes(name), *((OURS,) if name == "nvfp4" else ()))
    sign = 2 ** (formats.get(name).bits - 1)
    sums = {recipe: torch.zeros(4, dtype=torch.float64) for recipe in compared}
    for seed in range(matrices):
        values = weight(kind, seed)
        made = {recipe: code(values, recipe, name) for recipe in compared}
        first = made[compared[0]]
        for recipe, (codes, scales, decoded) in made.items():
            unsigned = [torch.where(each == sign, 0, each) for each in (codes, first[0])]
            sums[recipe] += torch.stack(
                [
                    (scales != first[1]).double().mean(),
                    (unsigned[0] != unsigned[1]).double().mean(),
                    (decoded - values).double().square().mean(),
                    values.double().square().mean(),
                ]
            )
    rows = []
    for recipe, (scales, codes, error, power) in (
        (key, each.tolist()) for key, each in sums.items()
    ):
        rows.append(
            {
                "figure": f"{name} {recipe}, {kind}",
                "format": name,
                "recipe": recipe,
                "weights": kind,
                "against": compared[0],
                "scales_differing": scales / matrices,
                "codes_differing": codes / matrices,
                "relative_rms_error": (error / power) ** 0.5,
            }
        )
        row = rows[-1]
        print(
            f"     {row['figure']}: scales {row['scales_differing']:.4%}, codes "
            f"{row['codes_differing']:.4%}, error {row['relative_rms_error']:.4%}"
        )
    return rows


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in ("nvfp4", *ELEMENTS):
        for kind in DRAWN:
            rows += compare(kind, name, arguments.matrices)
    return finish(rows, arguments.json)


if __name__ == "__main__":
    raise SystemExit(main())
