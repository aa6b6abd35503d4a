"""An independent model, in float64, of what the cpu backend computes with int8 activations.

Written from csrc/layout.h and kernels.h, not from the kernels.  The stored matrix is cut into
panels of 64 rows.  A column of a panel is multiplied in integers where all its rows are affine with
one tensor scale, or read one small table; pruned rows fit either.  Everything else, and outliers,
meets the activations as they are.  (So do small tables where the layout has to fill up columns
within a block, their number being no multiple of 8: no weight given to this model has such.)

A channel-wise weight (`numerics.stored_columns`) has its columns in another order, and all of its
small tables are multiplied in integers, by activations that were scaled by the tables' steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmosaic.formats import Format, Parameters
from bitmosaic.tensor import QuantizedTensor, invert
from numerics import assert_product, round_to_int8, stored_columns, table_step

PANEL = 64
PRUNED, FLOAT = 0, -1


@dataclass
class Held:
    """What the prepared layout holds of a weight, [out, in] each, in stored order."""

    kind: Tensor
    """PRUNED, FLOAT, or a number for each affine tensor scale and each small table."""
    value: Tensor
    """float64: what a weight means by the decode law."""
    stepped: Tensor
    """float64: what it stands for where small tables are rounded to int8."""
    small: Tensor
    """`value` of the code nearest to zero, which takes an outlier's place."""
    small_stepped: Tensor
    """`stepped` of that code."""


def assert_int8_product(
    actual: Tensor, x: Tensor, tensor: QuantizedTensor, bias: Tensor | None = None
) -> None:
    """Assert that `actual` is the product by int8 activations, but for float32's roundings."""
    exact, magnitude = int8_product(x, tensor)
    assert_product(actual, exact, magnitude, bias, tensor.shape[1])


def int8_product(x: Tensor, tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Multiply [..., in] as the integer mode does; also the sum of the products' magnitudes."""
    held = hold(tensor)
    delta = _place_outliers(tensor, held)
    gathered, scale = stored_columns(tensor)
    x = x if tensor.in_permutation is None else x[..., tensor.in_permutation.long()]
    x, delta = x.detach()[..., gathered], delta[:, gathered]
    value, stepped = held.value[:, gathered], held.stepped[:, gathered]
    whole = integer_columns(held.kind)[:, gathered] & (not is_strips(tensor))
    if scale is None:
        rounded = round_to_int8(x)[0]
    else:
        rounded = round_to_int8(x.float() * scale)[0]
        stepped, whole = (stepped / scale.double()).nan_to_num(0.0), whole & (scale > 0)
    plain, by_int8, by_float = x.double(), stepped * whole, value * ~whole
    exact = rounded @ by_int8.t() + plain @ by_float.t() + plain @ delta.t()
    magnitude = rounded.abs() @ by_int8.abs().t()
    magnitude = magnitude + plain.abs() @ (by_float.abs() + delta.abs()).t()
    if tensor.out_permutation is None:
        return exact, magnitude
    order = invert(tensor.out_permutation.long())
    return exact[..., order], magnitude[..., order]


def is_strips(tensor: QuantizedTensor) -> bool:
    """Tell whether all tiles of 16 columns are of at most two formats that strips hold.

    These are a fixed grid of 4 bits with a byte of scale for the 16, and one of 8 bits without;
    with the latter alone, only where tiles are less than a cell.
    """
    rows, columns = tensor.tile
    if columns % 16 and columns < tensor.shape[1]:
        return False
    used = {section.format for section, *_ in tensor.sections() if section.format.bits}

    def fits(fmt: Format) -> bool:
        if fmt.is_affine or fmt.learned_grid is not None:
            return False
        if fmt.bits == 8:
            return fmt.scale_format is None
        alone = fmt.group == 16 or min(columns, tensor.shape[1]) <= 16
        return fmt.bits == 4 and fmt.scale_format in ("e4m3", "e8m0") and alone

    narrow = any(fmt.bits == 4 for fmt in used) or min(rows, tensor.shape[0]) < PANEL
    narrow |= min(columns, tensor.shape[1]) < 128
    return 0 < len(used) <= 2 and all(map(fits, used)) and narrow


def hold(tensor: QuantizedTensor) -> Held:
    """Decode a tensor section by section into what the prepared layout holds."""
    empty = torch.zeros(tensor.shape, dtype=torch.float64)
    held = Held(empty.long(), *(empty.clone() for _ in range(4)))
    known: dict[tuple[float, ...], int] = {}
    factors = tensor.tensor_scales.clone().view(torch.float32).tolist()
    for section, codes, parameters in tensor.sections():
        factor = factors[section.format_index]
        *values, tables = _decode(section.format, codes, parameters, factor)
        kind = torch.tensor(
            [
                table if isinstance(table, int) else known.setdefault(table, len(known) + 1)
                for table in tables
            ]
        )
        kind = kind.reshape(-1, 1, 1).expand(section.count, section.rows, section.columns)
        section.scatter(held.kind, kind)
        matrices = (held.value, held.stepped, held.small, held.small_stepped)
        for matrix, value in zip(matrices, values, strict=True):
            section.scatter(matrix, section.ungroup(value))
    return held


def integer_columns(kind: Tensor) -> Tensor:
    """Tell, for every weight, whether its column of its panel is multiplied in integers."""
    whole = torch.zeros(kind.shape, dtype=torch.bool)
    for start in range(0, kind.shape[0], PANEL):
        rows = kind[start : start + PANEL]
        highest = rows.amax(dim=0)
        alike = ((rows == highest) | (rows == PRUNED)).all(dim=0)
        whole[start : start + PANEL] = alike & (highest > 0)
    return whole


def _decode(
    fmt: Format, codes: Tensor, parameters: Parameters, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int | tuple[float, ...]]]:
    """Return the last four fields of `Held`, and each tile's kind before it is numbered."""
    count = codes.shape[0]
    scale = torch.ones(codes.shape, dtype=torch.float64) * factor
    if parameters.scale is not None:
        scale = scale * parameters.scale[..., None].double()
    if fmt.is_affine:
        point = torch.full(codes.shape, fmt.fixed_zero_point, dtype=torch.float64)
        if parameters.zero_point is not None:
            point = parameters.zero_point[..., None].double().expand(codes.shape)
        value, small = (codes.double() - point) * scale, (point.floor() - point) * scale
        return value, value, small, small, [(factor,)] * count
    if fmt.bits == 0:
        nothing = torch.zeros_like(scale)
        return nothing, nothing, nothing, nothing, [PRUNED] * count
    grid = fmt.grid if parameters.grid is None else parameters.grid
    grid = grid.expand(count, -1)
    in_int8 = fmt.bits <= 4
    steps = torch.stack([_int8_table(each) for each in grid]) if in_int8 else grid.double()
    flat = codes.flatten(1).long()
    nearest = grid.abs().nan_to_num(torch.inf).argmin(dim=1, keepdim=True)
    tables = (grid.double(), steps)
    values = (table.gather(1, flat).reshape(codes.shape) * scale for table in tables)
    smallest = (table.gather(1, nearest).reshape(-1, 1, 1, 1) * scale for table in tables)
    kinds = [(factor, *row) for row in grid.tolist()] if in_int8 else [FLOAT] * count
    return *values, *smallest, kinds


def _int8_table(grid: Tensor) -> Tensor:
    """Round a table to whole multiples, up to 127, of one step, exactly where it can be."""
    step = table_step(grid)
    return (grid / step).round().double() * step


def _place_outliers(tensor: QuantizedTensor, held: Held) -> Tensor:
    """Put the code nearest to zero in each outlier's place; return what remains of their values."""
    delta = torch.zeros(tensor.shape, dtype=torch.float64)
    if tensor.outlier_values is None:
        return delta
    rows, columns = tensor.outlier_positions()
    if tensor.out_permutation is not None:
        rows = invert(tensor.out_permutation.long())[rows]
    if tensor.in_permutation is not None:
        columns = invert(tensor.in_permutation.long())[columns]
    values = tensor.outlier_values.double()
    held.value[rows, columns] = held.small[rows, columns]
    held.stepped[rows, columns] = held.small_stepped[rows, columns]
    delta[rows, columns] = values - held.small[rows, columns]
    return delta
