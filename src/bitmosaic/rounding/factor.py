"""The Hessian of a layer's error, factorised: what compensation needs, and what errors then cost.

    H = sum x x^T + damping = N D N^T,  N unit upper triangular

The output error of rounding, delta H delta^T, is the sum over j of D_j ((delta N)_j)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """The damped H of a layer's input as N D N^T, in_channels in the order of the visit.

    Attributes:
        visit: the in_channel visited first, second, and so on.
        unit: N, unit upper triangular [in, in], in that order.
        pivots: D by in_channel, in the weight's own order: the squared output error of an error of
            one that only later in_channels make up for.  0 without any activation.
    """

    visit: Int[Tensor, " in"]
    unit: Float[Tensor, "in in"]
    pivots: Float[Tensor, " in"]

    @property
    def lone_pivots(self) -> Float[Tensor, " in"]:
        """1 / (H^-1)_jj: the same as `pivots` where all other in_channels may make up for it."""
        inverse = torch.linalg.solve_triangular(
            self.unit, torch.eye(self.unit.shape[0]), upper=True, unitriangular=True
        )
        pivots = self.pivots[self.visit]
        dead = pivots == 0  # these hang together with no other: any pivot will do
        lone = 1 / (inverse.square() / pivots.masked_fill(dead, 1.0)[:, None]).sum(0)
        result = torch.empty_like(lone)
        result[self.visit] = lone.masked_fill(dead, 0.0)
        return result

    def reached(
        self, weight: Float[Tensor, "out in"], rounded: Float[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        """Each weight as the sweep had moved it when its column was rounded."""
        result = rounded.clone()
        result[:, self.visit] += (weight - rounded)[:, self.visit] @ self.unit
        return result


def factorise(
    hessian: Float[Tensor, "in in"],
    damping: float,
    *,
    act_order: bool = False,
    bands: Num[Tensor, " in"] | None = None,
    name: str = "hessian",
) -> Factor:
    """Factorise H, damped by a share of its mean diagonal, in the order of a visit.

    In_channels are visited as they come, or with `act_order` by falling diagonal of H; those of a
    lower number in `bands` before all others.

    The error of rounding, delta H delta^T, is then a sum of D_j times squares of (delta N)_j, each
    of which only depends on the columns up to j.  Rounding w_j + sum over i < j of delta_i N_ij
    makes the j-th one as small as it can be: that is GPTQ's compensation (its U is N D^(1/2)
    inverted), from one Cholesky factorisation of H with its order reversed, in^3/3 operations,
    without an inverse.  In_channels without any activation get a mean diagonal.
    """
    diagonal = hessian.diagonal()
    visit = torch.arange(hessian.shape[0])
    if act_order:
        visit = torch.argsort(diagonal, descending=True, stable=True)
    if bands is not None:
        visit = visit[torch.argsort(bands[visit], stable=True)]
    unit = damped_hessian(hessian, damping)
    if act_order or bands is not None:
        unit = unit[visit][:, visit]
    pivots = torch.empty(unit.shape[0])
    if not _factorise(unit, pivots):
        raise ValueError(_remedy(hessian, damping, name))
    placed = torch.empty_like(pivots)
    placed[visit] = pivots
    return Factor(visit, unit, placed.masked_fill_(diagonal == 0, 0.0))


def compensation_factor(
    hessian: Float[Tensor, "in in"], damping: float, name: str = "hessian"
) -> Float[Tensor, "in in"]:
    """Return the unit upper triangular N of `factorise`, in_channels as they come."""
    return factorise(hessian, damping, name=name).unit


def damped_hessian(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Add a share of the mean diagonal; in_channels without any activation get the mean."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    damped.diagonal()[diagonal == 0] = mean if mean > 0 else 1.0
    return damped


def _remedy(hessian: Tensor, damping: float, name: str) -> str:
    """Say what would make a Hessian positive definite, having tried it."""
    width = hessian.shape[0]
    what = f"{name} must be positive definite after damping, but its factorisation fails"
    if not bool(hessian.isfinite().all()):
        return f"{what}: it holds NaN or infinity. Check the model's weights and calibration text."
    larger = max(10 * damping, 1e-6)
    while larger < 1 and not _factorise(damped_hessian(hessian, larger), torch.empty(width)):
        larger *= 10
    enough = f"Use at least {width:,} calibration tokens, as many as in_channels"
    if larger >= 1:
        return f"{what} at any damping below 1 (at {damping:g} too). {enough}."
    return f"{what} with damping {damping:g}. {enough}, or a damping of {larger:g}, which will do."


_FACTOR_BLOCK = 512


def _factorise(matrix: Float[Tensor, "n n"], squares: Float[Tensor, " n"]) -> bool:
    """Replace a matrix by its unit upper factor N, from the last block up; False if it has none.

    `squares` receives the diagonal of D.

    LAPACK through torch runs at half the speed of these products, and then spends as long again on
    zeroing the other triangle (4096 wide, one thread).
    """
    for stop in range(matrix.shape[0], 0, -_FACTOR_BLOCK):
        start = max(0, stop - _FACTOR_BLOCK)
        lower, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop].flip(0, 1))
        corner = lower.flip(0, 1)  # upper triangular: the corner is corner @ corner.t()
        pivots = corner.diagonal()
        if int(info) or not bool(pivots.isfinite().all()):
            return False
        torch.square(pivots, out=squares[start:stop])
        inverse = torch.linalg.solve_triangular(corner, torch.eye(stop - start), upper=True)
        above = matrix[:start, start:stop] @ inverse.t()
        for last in range(start, 0, -_FACTOR_BLOCK):
            first = max(0, last - _FACTOR_BLOCK)
            matrix[:last, first:last].addmm_(above[:last], above[first:last].t(), alpha=-1)
        torch.div(above, pivots, out=above)
        matrix[:start, start:stop] = above
        matrix[start:stop, start:stop] = corner / pivots
        matrix[start:stop, :start] = 0
    return True
