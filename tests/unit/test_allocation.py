import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic import checkpoint, formats
from bitmosaic.allocation import (
    Allocation,
    Budget,
    BudgetError,
    TileCosts,
    feasible_range,
    overhead_bytes,
    parse_size,
    solve,
    solvers,
    two_level,
    uniform,
)
from bitmosaic.tiling import grid_shape
from strategies import SEEDS, example_names, few, layers

WIDTHS = ("int2-g128", "int3-g128", "int4-g128")
STEPS = torch.tensor([1 / 9, 1 / 49, 1 / 225], dtype=torch.float64)
"""The published cost of a width b, 1/(2^b - 1)^2, to be multiplied by a tile's score."""


def table(name, shape, tile, seed, names=WIDTHS, **options):
    """Draw costs that fall from format to format, over some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    tiles = grid_shape(shape, tile)
    drops = torch.rand((len(names), *tiles), generator=generator, dtype=torch.float64)
    size = 10 ** (3 * torch.rand(tiles, generator=generator, dtype=torch.float64))
    cost = drops.flip(0).cumsum(0).flip(0) * size
    return TileCosts(name, shape, tile, names, cost, **options)


def scored(name, score, names=WIDTHS, tile=(8, 32)):
    """Costs as published: score times 1/(2^b - 1)^2."""
    shape = (score.shape[0] * tile[0], score.shape[1] * tile[1])
    return TileCosts(name, shape, tile, names, score[None] * STEPS[:, None, None])


def random_scores(seed, *tiles):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(2 * torch.randn(tiles, generator=generator, dtype=torch.float64))


def flat(tables):
    """Costs and bytes of all tiles: two tensors [formats, tiles]."""
    return (
        torch.cat([each.cost.flatten(1) for each in tables], 1),
        torch.cat([each.bytes().flatten(1) for each in tables], 1),
    )


def chosen(tables, plans):
    """Index of each tile's format in the tables' own list, pooled."""
    parts = []
    for each in tables:
        plan = plans[each.name]
        index = torch.tensor([each.formats.index(name) for name in plan.formats])
        parts.append(index[plan.tile_map.long()].flatten())
    return torch.cat(parts)


def price(tables, choice):
    """(cost, bytes) of a pooled choice, the fixed bytes included."""
    cost, size = flat(tables)
    each = torch.arange(choice.numel())
    return float(cost[choice, each].sum()), int(size[choice, each].sum()) + overhead_bytes(tables)


def small_tables(seed):
    """Two layers with six tiles in all, ragged, so that all 729 choices can be tried."""
    return [table("a", (20, 40), (16, 32), seed), table("b", (16, 50), (16, 32), seed + 1)]


def every_choice(tables):
    tiles = flat(tables)[0].shape[1]
    for choice in itertools.product(range(len(tables[0].formats)), repeat=tiles):
        yield torch.tensor(choice)


@pytest.fixture
def _no_fill(monkeypatch):
    """Leave what remains of the budget after the last whole hull step."""
    monkeypatch.setattr(solvers, "_fill", lambda *_: None)


class TestSolve:
    @pytest.mark.parametrize("seed", range(4))
    def test_is_the_exact_optimum_at_hull_points(self, seed):
        tables = small_tables(seed)
        cost, size = flat(tables)
        prices = [price(tables, choice) for choice in every_choice(tables)]
        for multiplier in (10.0 ** (power / 4) for power in range(-12, 8)):
            hull = (cost + multiplier * size).argmin(0)
            budget = price(tables, hull)[1]
            best = min(cost for cost, spent in prices if spent <= budget)
            mine, spent = price(tables, chosen(tables, solve(tables, budget)))
            assert spent == budget
            # Sums of the same six numbers: each addition rounds once.
            assert mine <= best * (1 + 6 * 2.0**-53)

    @pytest.mark.parametrize("seed", range(4))
    def test_between_hull_points_it_is_within_the_next_step(self, seed):
        tables = small_tables(seed + 10)
        prices = [price(tables, choice) for choice in every_choice(tables)]
        low, high = feasible_range(tables)
        for budget in range(low, high, (high - low) // 60):
            best = min(cost for cost, spent in prices if spent <= budget)
            mine, spent = price(tables, chosen(tables, solve(tables, budget)))
            assert spent <= budget
            bound, step = relaxed(tables, budget)
            assert bound <= best * (1 + 1e-12)  # the relaxation itself is sound
            assert best <= mine * (1 + 1e-12)
            assert mine <= (bound + step) * (1 + 1e-12)

    @pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 1.0])
    def test_small_tiles_meet_the_budget_from_below(self, share):
        tables = [table(str(each), (512, 768), (16, 32), each) for each in range(3)]
        low, high = feasible_range(tables)
        budget = int(low + share * (high - low))
        plans = solve(tables, budget)
        spent = sum(plan.nbytes for plan in plans.values())
        assert 0.998 * budget <= spent <= budget

    @given(seed=SEEDS, share=st.floats(0, 1))
    @few(60)
    def test_never_exceeds_the_budget_on_ragged_tiles_and_odd_formats(self, seed, share):
        names = ("int2-g8", "pruned", "int3-g128", "fp8-e4m3", "int4-sym", "bf16")
        tables = [
            table("a", (13, 77), (4, 10), seed, names),
            table("b", (9, 33), (4, 10), seed + 1, names, in_permutation=torch.arange(33)),
        ]
        low, high = feasible_range(tables)
        budget = int(low + share * (high - low))
        plans = solve(tables, budget)
        assert sum(plan.nbytes for plan in plans.values()) <= budget
        assert price(tables, chosen(tables, plans))[1] <= budget

    def test_straight_hulls_keep_the_promise(self):
        # Costs on a line: rounding may make the later step of a tile the steeper one, by one unit.
        names = ("int2", "int8", "bf16")
        size = table("a", (8, 24), (8, 24), 0, names).bytes().double()
        inverted = 0
        for trial in range(1000):
            rate = (trial + 1) / 1001
            costs = TileCosts("a", (8, 24), (8, 24), names, 1000 * rate - size * rate)
            first, second = (
                float((costs.cost[low] - costs.cost[low + 1]) / (size[low + 1] - size[low]))
                for low in (0, 1)
            )
            overall = float((costs.cost[0] - costs.cost[2]) / (size[2] - size[0]))
            if not second > first >= overall:
                continue
            inverted += 1
            for middle in (size[0] + size[2] - size[1], size[1], size[2]):
                budget = int(middle) + costs.overhead
                assert price([costs], chosen([costs], solve([costs], budget)))[1] <= budget
        assert inverted

    @pytest.mark.usefixtures("_no_fill")
    def test_a_larger_budget_never_lowers_a_tile(self):
        tables = [table("a", (96, 200), (16, 32), 3), table("b", (40, 100), (16, 32), 4)]
        low, high = feasible_range(tables)
        before = torch.zeros(1, dtype=torch.long)
        for budget in range(low, high + 1, (high - low) // 40):
            now = chosen(tables, solve(tables, budget))
            assert (now >= before).all()
            before = now
        assert (now == 2).any()

    @pytest.mark.usefixtures("_no_fill")
    def test_the_two_thresholds_stand_in_the_ratio_of_the_published_costs(self):
        spacing = 1.002
        score = (spacing ** torch.arange(4096, dtype=torch.float64)).reshape(64, 64)
        tables = [scored("a", score)]
        low, high = feasible_range(tables)
        choice = chosen(tables, solve(tables, (low + high) // 2)).reshape(64, 64)
        first = float(score[choice == 1].min())
        second = float(score[choice == 2].min())
        expected = (1 / 9 - 1 / 49) / (1 / 49 - 1 / 225)
        assert expected == pytest.approx(5.68, abs=0.005)
        # Either threshold lies within one spacing below the first score above it.
        assert 1 / spacing < second / first / expected < spacing

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("average", [2.25, 2.5, 2.75, 3.25, 3.75])
    def test_costs_no_more_than_the_grid_search_at_its_bytes(self, seed, average):
        score = random_scores(seed, 40, 25)
        tables = [scored("a", score)]
        cost, choice = grid_search(score.flatten(), average)
        spent = price(tables, choice)[1]
        mine, used = price(tables, chosen(tables, solve(tables, spent)))
        assert used <= spent
        assert mine <= cost * (1 + 1e-12)  # 1000 float64 additions in two orders

    def test_scaling_all_costs_changes_nothing(self):
        tables = small_tables(5)
        low, high = feasible_range(tables)
        scaled = [
            TileCosts(each.name, each.shape, each.tile, each.formats, each.cost * 2.0**40)
            for each in tables
        ]
        for budget in range(low, high, 11):
            assert torch.equal(
                chosen(tables, solve(tables, budget)), chosen(scaled, solve(scaled, budget))
            )

    def test_one_format_needs_its_exact_bytes(self):
        tables = [table("a", (64, 64), (16, 32), 0, ("int4-g128",))]
        size = feasible_range(tables)[1]
        assert solve(tables, size)["a"].formats == ("int4-g128",)
        with pytest.raises(BudgetError):
            solve(tables, size - 1)

    def test_useless_formats_are_never_bought(self):
        tables = [table("a", (64, 64), (16, 32), 0)]
        worse = tables[0].cost.clone()
        worse[2] = worse[0] + 1
        tables = [TileCosts("a", (64, 64), (16, 32), WIDTHS, worse)]
        assert "int4-g128" not in solve(tables, feasible_range(tables)[1])["a"].formats

    def test_costs_must_be_finite_and_of_one_list_of_formats(self):
        good = table("a", (64, 64), (16, 32), 0)
        bad = TileCosts("b", good.shape, good.tile, good.formats, good.cost * torch.nan)
        middle = sum(feasible_range([good, good])) // 2
        with pytest.raises(ValueError, match="tile costs must be finite"):
            solve([good, bad], middle)
        other = table("b", (64, 64), (16, 32), 0, WIDTHS[::-1])
        with pytest.raises(ValueError, match="must share one tuple of formats"):
            solve([good, other], middle)


def relaxed(tables, budget):
    """Least cost if tiles could mix formats, and the most that the one mixed hull step can save.

    The dual max over multipliers of min(cost + multiplier bytes) - multiplier budget; it is
    piecewise linear with kinks at the slopes between two formats of a tile.
    """
    cost, size = flat(tables)
    size = size.double()
    left = budget - overhead_bytes(tables)
    pairs = itertools.permutations(range(len(cost)), 2)
    slopes = torch.cat([(cost[a] - cost[b]) / (size[b] - size[a]) for a, b in pairs])
    slopes = torch.cat([slopes[slopes.isfinite() & (slopes > 0)], torch.zeros(1)])
    values = [float((cost + s * size).amin(0).sum() - s * left) for s in slopes]
    best = max(range(len(values)), key=values.__getitem__)
    return values[best], float(slopes[best] * (size.amax(0) - size.amin(0)).max())


def grid_search(score, average):
    """Find the published three-width allocation: shares on a grid of 0.01 and pooled quantiles."""
    order = torch.argsort(score)
    count = score.numel()
    best = (math.inf, torch.zeros(count, dtype=torch.long))
    for percent in range(101):
        low = percent / 100
        high = average - 3 + low
        middle = 1 - low - high
        if high < -1e-9 or middle < -1e-9:
            continue
        choice = torch.full((count,), 2)
        first, second = round(low * count), round((low + middle) * count)
        choice[order[:second]] = 1
        choice[order[:first]] = 0
        cost = float((score * STEPS[choice]).sum())
        best = min(best, (cost, choice), key=lambda pair: pair[0])
    return best


class TestFeasible:
    def test_the_range_is_reached_and_nothing_beyond(self):
        tables = small_tables(1)
        low, high = feasible_range(tables)
        sizes = [price(tables, choice)[1] for choice in every_choice(tables)]
        assert (low, high) == (min(sizes), max(sizes))

    @pytest.mark.parametrize("beyond", ["below", "above"])
    def test_a_budget_outside_is_refused_naming_the_range_and_the_nearest(self, beyond):
        tables = small_tables(1)
        low, high = feasible_range(tables)
        budget = low - 1 if beyond == "below" else math.ceil(high / 0.998) + 1
        weights = 20 * 40 + 16 * 50
        with pytest.raises(BudgetError, match=f"between {low:,} and {high:,} bytes") as caught:
            solve(tables, budget)
        nearest = low if beyond == "below" else high
        assert f"nearest feasible one is {8 * nearest / weights:.3f}" in str(caught.value)
        with pytest.raises(BudgetError):
            two_level(tables, [each.cost[0] for each in tables], budget)
        assert solve(tables, nearest)

    def test_a_budget_a_little_above_the_largest_is_met_by_the_largest(self):
        tables = small_tables(1)
        high = feasible_range(tables)[1]
        spent = price(tables, chosen(tables, solve(tables, math.floor(high / 0.998))))[1]
        assert spent == high


class TestTwoLevel:
    @pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.9])
    def test_takes_exactly_as_many_wide_tiles_as_fit(self, share):
        score = random_scores(1, 30, 20)
        tables = [scored("a", score[:10]), scored("b", score[10:])]
        low, high = feasible_range(tables)
        budget = int(low + share * (high - low))
        choice = chosen(tables, two_level(tables, [score[:10], score[10:]], budget))
        sizes = flat(tables)[1][:, 0]
        narrow = int(share >= 0.5)
        base = overhead_bytes(tables) + 600 * int(sizes[narrow])
        count = (budget - base) // int(sizes[narrow + 1] - sizes[narrow])
        assert sorted(set(choice.tolist())) == [narrow, narrow + 1]
        wide = choice == narrow + 1
        assert int(wide.sum()) == count
        assert score.flatten()[wide].min() >= score.flatten()[~wide].max()

    def test_unequal_tiles_compete_per_weight(self):
        tables = [table("a", (24, 80), (16, 32), 0)]
        score = random_scores(2, 2, 3)
        low, high = feasible_range(tables)
        choice = chosen(tables, two_level(tables, [score], low + (high - low) // 4))
        density = score / torch.tensor([[512, 512, 256], [256, 256, 128]])
        wide = choice.reshape(2, 3) == 1
        assert 0 < int(wide.sum()) < 6
        assert density[wide].min() >= density[~wide].max()

    def test_scaling_the_scores_changes_nothing(self):
        score = random_scores(3, 20, 20)
        tables = [scored("a", score)]
        low, high = feasible_range(tables)
        budget = low + (high - low) // 3
        plain = two_level(tables, [score], budget)["a"].tile_map
        for factor in (1e-30, 0.37, 1e30):
            assert torch.equal(two_level(tables, [score * factor], budget)["a"].tile_map, plain)

    def test_ties_go_to_the_earlier_tile(self):
        tables = [scored("a", torch.ones(1, 8, dtype=torch.float64))]
        low, high = feasible_range(tables)
        plan = two_level(tables, [torch.ones(1, 8)], low + (high - low) // 4)["a"]
        assert plan.tile_map.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]

    @given(seed=SEEDS, share=st.floats(0, 1))
    @few(60)
    def test_never_exceeds_the_budget_even_where_no_format_is_cheapest(self, seed, share):
        # int2-g8 is cheaper than int3-g128 in the narrow last tile only.
        names = ("int2-g8", "int3-g128", "int4-g16")
        tables = [table("a", (13, 77), (4, 24), seed, names)]
        low, high = feasible_range(tables)
        budget = int(low + share * (high - low))
        sizes = flat(tables)[1].sum(1) + overhead_bytes(tables)
        if budget < int(sizes.min()):
            with pytest.raises(BudgetError, match=f"at least {int(sizes.min()):,} bytes"):
                two_level(tables, [tables[0].cost[0]], budget)
        else:
            plans = two_level(tables, [tables[0].cost[0]], budget)
            assert price(tables, chosen(tables, plans))[1] <= budget


class TestPlans:
    def test_bytes_are_those_of_the_packed_tile(self):
        costs = table("a", (20, 40), (16, 32), 0)
        for index, name in enumerate(WIDTHS):
            fmt = formats.get(name)
            expected = [[fmt.tile_bytes(16, 32), fmt.tile_bytes(16, 8)],
                        [fmt.tile_bytes(4, 32), fmt.tile_bytes(4, 8)]]  # fmt: skip
            assert costs.bytes()[index].tolist() == expected

    def test_overhead_counts_map_scales_and_permutations(self):
        order = torch.arange(40)
        costs = table("a", (20, 40), (16, 32), 0, in_permutation=order)
        assert costs.overhead == 3 * 4 + 2 * 1 + 2 * 40

    @given(layer=layers(example_names()))
    @few(60)
    def test_uniform_bands_cost_what_one_tile_costs(self, layer):
        name = layer.formats[0]
        plan = uniform(layer.shape, name, layer.in_permutation)
        fixed = 4 + (2 * layer.shape[1] if layer.in_permutation is not None else 0)
        assert plan.nbytes == formats.get(name).tile_bytes(*layer.shape) + fixed

    def test_allocation_survives_its_file(self, tmp_path):
        tables = [
            table("a.q", (20, 40), (16, 32), 0, in_permutation=torch.randperm(40)),
            table("b.o", (64, 96), (16, 32), 1, out_permutation=torch.randperm(64)),
        ]
        plans = solve(tables, sum(feasible_range(tables)) // 2)
        ties = {"a.q": torch.randperm(7)}
        made = Allocation(plans, {"method": "x", "budget": 2.5}, ties, torch.randperm(40))
        made.save(tmp_path / "allocation.safetensors")
        read = Allocation.load(tmp_path / "allocation.safetensors")
        assert read.recipe == made.recipe
        assert (read.nbytes, read.bits_per_weight) == (made.nbytes, made.bits_per_weight)
        assert torch.equal(read.residual, made.residual)
        assert torch.equal(read.ties["a.q"], ties["a.q"])
        assert list(read.layers) == list(plans)
        for name, plan in plans.items():
            again = read.layers[name]
            assert (again.shape, again.tile, again.formats) == (plan.shape, plan.tile, plan.formats)
            for field in ("tile_map", "in_permutation", "out_permutation"):
                before, after = getattr(plan, field), getattr(again, field)
                assert before is after is None or torch.equal(before, after)

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        path = tmp_path / "a.safetensors"
        checkpoint.write_tensors(path, {"x": torch.zeros(1)})
        with pytest.raises(ValueError, match="must be an allocation file"):
            Allocation.load(path)

    @pytest.mark.parametrize(
        ("damage", "named"),
        [
            (lambda tensors: tensors.pop("a.tile_map"), "a.tile_map"),
            (lambda tensors: tensors["a.tile_map"].fill_(3), "a format that is not there"),
            (lambda tensors: tensors.update({"a.tile_map": torch.zeros(1, 1)}), "does not cover"),
            (lambda tensors: tensors["a.in_permutation"].fill_(0), "is no permutation"),
            (lambda tensors: tensors["residual"].add_(1), "residual is no permutation"),
        ],
    )
    def test_a_damaged_file_is_refused(self, tmp_path, damage, named):
        path = tmp_path / "a.safetensors"
        costs = replace(table("a", (20, 40), (16, 32), 0), in_permutation=torch.arange(40).flip(0))
        layers = {"a": costs.plan(torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8))}
        Allocation(layers, {}, {}, torch.arange(8).flip(0)).save(path)
        assert Allocation.load(path).residual is not None
        tensors, metadata = checkpoint.read_tensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        damage(tensors)
        checkpoint.write_tensors(path, tensors, metadata)
        with pytest.raises(ValueError, match=f"damaged .*{named}"):
            Allocation.load(path)

    def test_a_plan_of_narrow_matrices_survives_its_file(self, tmp_path):
        narrow_plan().save(tmp_path / "a.safetensors")
        read = Allocation.load(tmp_path / "a.safetensors")
        assert [layer.original_shape for layer in read.layers.values()] == [(44, 32), (32, 44)]
        assert [layer.is_narrow for layer in read.layers.values()] == [True, True]
        assert read.ties["down"].tolist() == [7, 43, 0]
        assert (read.weights, read.kept_weights) == (2 * 32 * 44, 2 * 32 * 3)
        assert read.bits_per_weight == 8 * read.nbytes / (2 * 32 * 44)
        assert read.bits_per_kept_weight == 8 * read.nbytes / (2 * 32 * 3)

    @pytest.mark.parametrize("order", [
        [7, 43, 43], [7, 44, 0], [7, -1, 0], [7, 43], [7, 43, 0, 1], [[7, 43, 0]], [7.0, 43.0, 0.0],
        [], [True, False, True],
    ])  # fmt: skip
    def test_an_order_that_is_no_selection_is_refused(self, tmp_path, order):
        path = tmp_path / "a.safetensors"
        narrow_plan().save(path)
        tensors, metadata = checkpoint.read_tensors(path)
        checkpoint.write_tensors(path, {**tensors, "down.tie": torch.tensor(order)}, metadata)
        with pytest.raises(ValueError, match=r"damaged \(down\.tie must hold 3 distinct channels"):
            Allocation.load(path)

    @pytest.mark.parametrize(
        ("name", "shape", "named"),
        [
            ("down", [32, 2], "down must have fewer channels than the model on one side only"),
            ("down", [31, 44], "down must have fewer channels"),
            ("down", [33, 44], "down must have fewer channels"),
            ("down", [32], "not enough values"),
            ("down", "x", "not enough values"),
            ("down", [32, math.inf], "infinity"),
            ("up", [3, 44], "up keeps 32 in_channels, but no tie says which"),
            ("up", [2, 32], "up must have fewer channels"),
        ],
    )
    def test_an_original_shape_that_does_not_fit_is_refused(self, tmp_path, name, shape, named):
        path = tmp_path / "a.safetensors"
        narrow_plan().save(path)
        tensors, metadata = checkpoint.read_tensors(path)
        described = json.loads(metadata["layers"])
        described[name]["original_shape"] = shape
        checkpoint.write_tensors(path, tensors, {**metadata, "layers": json.dumps(described)})
        with pytest.raises(ValueError, match=f"damaged.*{named}"):
            Allocation.load(path)


def narrow_plan():
    layers = {
        "up": replace(uniform((3, 32), "int4"), original_shape=(44, 32)),
        "down": replace(uniform((32, 3), "int4"), original_shape=(32, 44)),
    }
    return Allocation(layers, ties={"down": torch.tensor([7, 43, 0])})


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "budget"),
        [
            ("1.4GiB", Budget(size=1503238553)),
            ("600MB", Budget(size=600_000_000)),
            ("123456", Budget(size=123456)),
            (" 5 kib ", Budget(size=5120)),
            (".5mb", Budget(size=500_000)),
            ("0.2x", Budget(share=0.2)),
            ("7b", Budget(size=7)),
        ],
    )
    def test_sizes_are_read(self, text, budget):
        assert parse_size(text) == budget

    @pytest.mark.parametrize(
        "text", ["", "GiB", "1.4 Gi", "-5MB", "1e9", "1,5GB", "5 5MB", "1.2.3"]
    )
    def test_other_texts_are_refused(self, text):
        with pytest.raises(ValueError, match="size must be a number with a unit"):
            parse_size(text)

    @pytest.mark.parametrize(
        "fields",
        [{}, {"bits": 2.5, "size": 10}, {"bits": 0}, {"bits": -1.0}, {"bits": math.nan},
         {"bits": math.inf}, {"size": 0}, {"share": 0.0}],
    )  # fmt: skip
    def test_a_budget_is_one_positive_number(self, fields):
        with pytest.raises(ValueError, match="budget must be exactly one positive number"):
            Budget(**fields)

    def test_prints_as_it_was_meant(self):
        assert str(Budget(bits=2.75)) == "2.75 bits_per_weight"
        assert str(Budget(size=7)) == "7 bytes"
        assert str(Budget(share=0.2)) == "0.2x"
