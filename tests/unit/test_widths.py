"""Widths and bits under one budget: against all choices there are."""

from __future__ import annotations

import pytest
import torch

from bitmosaic.allocation import TileCosts, overhead_bytes
from bitmosaic.allocation.widths import Width, critical_prices, priced, solve_widths, without

FORMATS = ("int2", "int4")
TILE = 8


def tables(seed: int, units: int = 3) -> dict[str, TileCosts]:
    """An MLP's three matrices with costs that fall with bits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (("gate", (units * TILE, TILE)), ("up", (units * TILE, TILE)),
                        ("down", (TILE, units * TILE))):  # fmt: skip
        grid = (shape[0] // TILE, shape[1] // TILE)
        high = torch.rand((1, *grid), generator=generator, dtype=torch.float64)
        cost = torch.cat([high * (2 + torch.rand((1, *grid), generator=generator)), high])
        found[name] = TileCosts(name, shape, (TILE, TILE), FORMATS, cost)
    return found


def total(found: dict[str, TileCosts], layers: dict, gone: int, worth: torch.Tensor) -> float:
    """Estimated loss of a plan whose first tiles of the width are gone."""
    loss = float(worth[:gone].sum())
    for name, layer in layers.items():
        rows, columns = (0, gone * TILE) if name == "down" else (gone * TILE, 0)
        table = without(found[name], rows, columns)
        index = torch.tensor([FORMATS.index(each) for each in layer.formats])
        grid = table.cost.shape[1:]
        tile_map = layer.tile_map if layer.tile_map.numel() == grid.numel() else torch.zeros(grid)
        loss += float(table.cost.gather(0, index[tile_map.long()].view(1, *grid)).sum())
    return loss


def ordered(seed: int) -> tuple[dict[str, TileCosts], Width, torch.Tensor, torch.Tensor]:
    found = tables(seed)
    worth = torch.rand(3, generator=torch.Generator().manual_seed(seed + 1)).double() * 6
    names = ("down", ("gate", "up"))
    each = (worth / TILE).repeat_interleave(TILE)
    sorted_width, moved, order = priced(names, found, torch.arange(3 * TILE), each)
    place = order[::TILE] // TILE
    return moved, sorted_width, worth[place], order


@pytest.mark.parametrize("seed", range(12))
def test_prices_are_where_a_width_is_worth_its_bytes(seed: int) -> None:
    found = tables(seed)
    worth = torch.rand(3, generator=torch.Generator().manual_seed(seed)).double() * 6 + 1e-3
    prices = critical_prices("down", ("gate", "up"), found, worth)
    for unit in range(3):
        cost = torch.cat([found["gate"].cost[:, unit], found["up"].cost[:, unit],
                          found["down"].cost[:, :, unit]], 1)  # fmt: skip
        size = torch.cat([found["gate"].bytes()[:, unit], found["up"].bytes()[:, unit],
                          found["down"].bytes()[:, :, unit]], 1).double()  # fmt: skip
        paid = float((cost + prices[unit] * size).amin(0).sum())
        least = float(cost.amin(0).sum())
        if float(worth[unit]) <= least:  # worth nothing even where bytes are free
            assert float(prices[unit]) < 1e-50
        else:
            assert paid == pytest.approx(float(worth[unit]), rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_tiles_come_by_rising_price_and_the_last_one_stays(seed: int) -> None:
    before = tables(seed)
    moved, width, _, order = ordered(seed)
    assert bool((width.prices[:-1].diff() >= 0).all())
    assert float(width.prices[-1]) == float("inf")
    assert order[-TILE:].tolist() == [*range(2 * TILE, 3 * TILE)]
    place = order[::TILE] // TILE
    for name in ("gate", "up"):
        assert torch.equal(moved[name].cost, before[name].cost[:, place])
    assert torch.equal(moved["down"].cost, before["down"].cost[:, :, place])


@pytest.mark.parametrize("seed", range(24))
def test_the_plan_is_the_best_at_its_multiplier(seed: int) -> None:
    """What is best at some price of a byte, of all widths and formats, is found by its bytes."""
    found, width, worth, _ = ordered(seed)
    price = float(torch.rand(1, generator=torch.Generator().manual_seed(seed)).double()) * 0.1
    size = {name: table.bytes().double() for name, table in found.items()}
    best, loss, taken = float("inf"), 0.0, 0.0
    for dropped in range(3):
        lost, spent = float(worth[:dropped].sum()), 0.0
        for name, table in found.items():
            cut = (slice(None), *((slice(None), slice(dropped, None)) if name == "down" else
                                  (slice(dropped, None), slice(None))))  # fmt: skip
            cost, room = table.cost[cut], size[name][cut]
            chosen = (cost + price * room).argmin(0, keepdim=True)
            lost += float(cost.gather(0, chosen).sum())
            spent += float(room.gather(0, chosen).sum())
        if lost + price * spent < best:
            best, loss, taken = lost + price * spent, lost, spent
    budget = int(taken) + overhead_bytes([*found.values()])
    layers = solve_widths([*found.values()], budget, [width])
    assert sum(layer.nbytes for layer in layers.values()) <= budget
    gone = 3 - layers["down"].shape[1] // TILE
    assert layers["gate"].shape == layers["up"].shape == ((3 - gone) * TILE, TILE)
    # Narrower matrices have smaller maps: with what they leave the plan may be better still.
    assert total(found, layers, gone, worth) <= loss + 1e-12


def test_a_plan_that_could_not_take_the_budget_keeps_more() -> None:
    found = tables(0)
    whole = sum(int(table.bytes()[1].sum()) for table in found.values())
    budget = whole + overhead_bytes([*found.values()])
    cheap = Width("down", ("gate", "up"), torch.tensor([1e-300, 1e-299, torch.inf]).double())
    layers = solve_widths([*found.values()], budget, [cheap])
    assert layers["down"].shape == (TILE, 3 * TILE)
    assert sum(layer.nbytes for layer in layers.values()) >= 0.9 * budget


def test_without_widths_it_is_the_plain_solver() -> None:
    found = [*tables(0).values()]
    budget = sum(int(table.bytes()[1].sum()) for table in found) + overhead_bytes(found)
    layers = solve_widths(found, budget, [])
    assert {layer.shape for layer in layers.values()} == {table.shape for table in found}
