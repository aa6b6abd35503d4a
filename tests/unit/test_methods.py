"""What each method does with weights and statistics, without a model around it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmosaic import formats, methods, rounding
from bitmosaic.allocation import BudgetError, LayerAllocation, TileCosts, feasible_range, uniform
from bitmosaic.methods.base import BlockView, LayerStatistics, Method
from bitmosaic.methods.gptq import Gptq
from bitmosaic.methods.layerwise import Layerwise
from bitmosaic.methods.rtn import LADDER, Rtn
from bitmosaic.methods.sfmp import SOLVERS, Sfmp
from bitmosaic.model.structure import InputGroup, Structure, Tie
from bitmosaic.tensor import QuantizedTensor
from bitmosaic.tiling import clip_tile, grid_shape

NAMES = ("int2-g16", "int3-g16", "int4-g16")


def random_block(
    shapes: dict[str, tuple[int, int]], seed: int = 0, ties: tuple[Tie, ...] = ()
) -> BlockView:
    """Make weights, and a Fisher of whole numbers, whose sums are exact in any order.

    Rows and columns differ in importance by some octaves, as in real models.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, fisher = {}, {}
    for name, shape in shapes.items():
        weights[name] = torch.randn(shape, generator=generator)
        rows, columns = (torch.randn(side, generator=generator).exp2() for side in shape)
        spread = torch.rand(shape, generator=generator) * rows[:, None] * columns * 1000
        fisher[name] = spread.round() + 1
    groups = tuple(InputGroup((name,)) for name in shapes)
    return BlockView(weights, Structure(groups, ties), fisher)


def plan(method: Method, block: BlockView, share: float) -> dict[str, LayerAllocation]:
    """Allocate a share of the way from the smallest to the largest budget."""
    scores = method.score(block)
    low, high = feasible_range(scores.tables)
    return method.allocate([scores], low + int(share * (high - low)))


def quantize(
    method: Method, block: BlockView, layers: dict[str, LayerAllocation]
) -> dict[str, QuantizedTensor]:
    return {
        name: method.quantize(name, block.weights[name], layers[name], LayerStatistics())
        for name in layers
    }


def sfmp(**choices: Any) -> Sfmp:
    return Sfmp(**{"base": "nearest", "formats": NAMES, "tile_out": 16, "tile_in": 16, **choices})


# SFMP


def test_one_format_gives_the_codes_of_plain_rounding_on_sorted_groups() -> None:
    block = random_block({"a": (40, 56)})
    method = sfmp(formats=("int3-g16",), reorder="per_matrix")
    layers = plan(method, block, 1.0)
    tensor = quantize(method, block, layers)["a"]
    rows = block.fisher["a"].sum(1).argsort(descending=True, stable=True)
    columns = block.fisher["a"].sum(0).argsort(descending=True, stable=True)
    tiles = torch.zeros(3, 4, dtype=torch.uint8)
    unsorted = LayerAllocation((40, 56), (16, 16), ("int3-g16",), tiles)
    plain = rounding.nearest(block.weights["a"][rows][:, columns], unsorted)
    assert torch.equal(tensor.out_permutation.long(), rows)
    assert torch.equal(tensor.in_permutation.long(), columns)
    for key in ("codes", "scales", "zero_points", "tensor_scales"):
        assert torch.equal(getattr(tensor, key), getattr(plain, key)), key
    decoded = torch.empty(40, 56)
    decoded[rows[:, None], columns] = plain.dequantize()
    assert torch.equal(tensor.dequantize(), decoded)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("score", ["fisher", "fisher_error"])
def test_the_order_in_which_channels_come_does_not_matter(solver: str, score: str) -> None:
    """Sorting undoes any shuffle, where no two channels are worth the same."""
    shapes = {"a": (48, 64), "b": (33, 70)}
    block = random_block(shapes)
    for fisher in block.fisher.values():
        assert all(fisher.sum(axis).unique().numel() == fisher.shape[1 - axis] for axis in (0, 1))
    generator = torch.Generator().manual_seed(3)
    orders = {
        name: tuple(torch.randperm(side, generator=generator) for side in shape)
        for name, shape in shapes.items()
    }

    def shuffle(tables: Any) -> dict[str, Tensor]:
        return {name: tables[name][rows][:, columns] for name, (rows, columns) in orders.items()}

    shuffled = BlockView(shuffle(block.weights), block.structure, shuffle(block.fisher))
    method = sfmp(reorder="per_matrix", solver=solver, score_by=score)
    before = quantize(method, block, plan(method, block, 0.4))
    after = quantize(method, shuffled, plan(method, shuffled, 0.4))
    restored = {name: tensor.dequantize() for name, tensor in before.items()}
    for name, expected in shuffle(restored).items():
        assert torch.equal(after[name].dequantize(), expected)


@pytest.mark.parametrize("factor", [2.0**-60, 1 / 3, 1e9])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("score", ["fisher", "fisher_error"])
def test_the_unit_of_importance_does_not_matter(solver: str, score: str, factor: float) -> None:
    block = random_block({"a": (48, 64), "b": (33, 70)})
    scaled = {name: fisher.double() * factor for name, fisher in block.fisher.items()}
    method = sfmp(reorder="per_matrix", solver=solver, score_by=score)
    layers = plan(method, block, 0.3)
    again = plan(method, BlockView(block.weights, block.structure, scaled), 0.3)
    for name, layer in layers.items():
        assert layer.formats == again[name].formats
        assert torch.equal(layer.tile_map, again[name].tile_map)
        assert torch.equal(layer.in_permutation, again[name].in_permutation)


def realised_cost(tables: list[TileCosts], layers: dict[str, LayerAllocation]) -> float:
    """Sum what the chosen formats cost, by other tables than those they were chosen by."""
    total = 0.0
    for table in tables:
        layer = layers[table.name]
        if layer.tile_map.shape != table.cost.shape[1:]:  # one format, cut into bands
            chosen = torch.full(table.cost.shape[1:], table.formats.index(layer.formats[0]))
        else:
            index = torch.tensor([table.formats.index(name) for name in layer.formats])
            chosen = index[layer.tile_map.long()]
        total += float(table.cost.gather(0, chosen[None].long()).sum())
    return total


def hull_points(tables: list[TileCosts], count: int) -> list[int]:
    """Walk the tiles' hulls by hand: the bytes at which the solution is optimal for sure."""
    steps = []
    for table in tables:
        sizes = table.bytes().flatten(1).t().tolist()
        costs = table.cost.flatten(1).t().tolist()
        for size, cost in zip(sizes, costs, strict=True):
            here, last = 0, len(size) - 1
            while here < last:
                slopes = [
                    ((cost[here] - cost[up]) / (size[up] - size[here]), up)
                    for up in range(here + 1, last + 1)
                ]
                slope, best = max(slopes)
                if slope <= 0:
                    break
                steps.append((slope, size[best] - size[here]))
                here = best
    steps.sort(key=lambda step: -step[0])
    points = [feasible_range(tables)[0]]
    for (slope, extra), (following, _) in pairwise(steps):
        points.append(points[-1] + extra)
        assert slope >= following
    return points[1 :: len(points) // count]


@pytest.mark.parametrize("seed", range(4))
def test_weighing_by_the_error_loses_less_than_weighing_by_importance(seed: int) -> None:
    """At equal bytes, on the hull, no other choice of formats has a smaller sum of F e^2."""
    block = random_block({"a": (48, 64), "b": (33, 70), "c": (16, 100)}, seed)
    for name in block.weights:  # errors that importance knows nothing of
        block.weights[name].mul_(torch.randn(block.weights[name].shape[0], 1).exp())
    ours, paper = sfmp(reorder="none"), sfmp(reorder="none", score_by="fisher")
    measured, published = ours.score(block), paper.score(block)
    strictly = 0
    for budget in hull_points(measured.tables, 8):
        best = realised_cost(measured.tables, ours.allocate([measured], budget))
        other = realised_cost(measured.tables, paper.allocate([published], budget))
        assert best <= other * (1 + 1e-12)  # sums of some hundred float64 numbers
        strictly += best < other
    assert strictly >= 6


def test_measured_costs_are_the_errors_that_rounding_makes() -> None:
    block = random_block({"a": (40, 56)})
    for reorder in ("none", "per_matrix"):
        table = sfmp(reorder=reorder).score(block).tables[0]
        for index, name in enumerate(NAMES):
            grid = torch.zeros(table.cost.shape[1:], dtype=torch.uint8)
            layer = LayerAllocation(
                (40, 56), (16, 16), (name,), grid, table.in_permutation, table.out_permutation
            )
            error = rounding.nearest(block.weights["a"], layer).dequantize() - block.weights["a"]
            loss = float((block.fisher["a"] * error.square()).sum(dtype=torch.float64)) / 2
            # Both add 2240 float32 products, in different orders: 4 sqrt(n) u of their sum.
            assert abs(float(table.cost[index].sum()) - loss) <= 4 * 2240**0.5 * 2**-24 * loss


def test_published_costs_are_importance_over_the_squared_step() -> None:
    block = random_block({"a": (40, 56)})
    scores = sfmp(score_by="fisher", reorder="none").score(block)
    importance = scores.importance[0]
    assert float(importance[2, 3]) == float(block.fisher["a"][32:40, 48:56].sum())
    for index, steps in enumerate((3, 7, 15)):
        assert torch.equal(scores.tables[0].cost[index], importance / steps**2)


def test_two_levels_are_a_threshold_on_importance_per_weight() -> None:
    shapes = {"a": (48, 64), "b": (33, 70)}
    block = random_block(shapes)
    method = sfmp(solver="two_level", reorder="per_matrix")
    scores = method.score(block)
    low, high = feasible_range(scores.tables)
    counts = []
    for share in (0.05, 0.3, 0.45, 0.7, 0.95):
        layers = method.allocate([scores], low + int(share * (high - low)))
        wide, narrow, used = [], [], set()
        for table, importance in zip(scores.tables, scores.importance, strict=True):
            layer = layers[table.name]
            used |= set(layer.formats)
            tall, broad = grid_shape(table.shape, table.tile)
            heights = torch.tensor([min(16, table.shape[0] - 16 * i) for i in range(tall)])
            widths = torch.tensor([min(16, table.shape[1] - 16 * i) for i in range(broad)])
            density = importance / (heights[:, None] * widths)
            index = [NAMES.index(name) for name in layer.formats]
            if layer.tile_map.shape == density.shape:
                width = torch.tensor(index)[layer.tile_map.long()]
            else:
                width = torch.full(density.shape, index[0])
            wide.append(density[width == width.max()] if len(used) > 1 else density[:0])
            narrow.append(torch.stack([density, width.double()]))
        pairs = torch.cat([part.flatten(1) for part in narrow], dim=1)
        levels = pairs[1].unique().tolist()
        assert len(levels) <= 2
        assert len(levels) == 1 or levels[1] - levels[0] == 1
        top = pairs[0][pairs[1] == levels[-1]]
        if len(levels) == 2:
            assert float(top.min()) >= float(pairs[0][pairs[1] == levels[0]].max())
        counts.append((levels[-1], top.numel()))
    assert counts == sorted(counts)
    assert len(set(counts)) == 5


def test_consumers_of_one_input_share_its_order() -> None:
    shapes = {"q": (32, 48), "k": (16, 48), "o": (48, 32)}
    block = random_block(shapes)
    groups = (InputGroup(("q", "k")), InputGroup(("o",)))
    block = BlockView(block.weights, Structure(groups, ()), block.fisher)
    tables = {table.name: table for table in sfmp(reorder="shared").score(block).tables}
    total = block.fisher["q"].sum(0) + block.fisher["k"].sum(0)
    expected = total.argsort(descending=True, stable=True)
    assert torch.equal(tables["q"].in_permutation, expected)
    assert torch.equal(tables["k"].in_permutation, expected)
    rows = block.fisher["q"].sum(1).argsort(descending=True, stable=True)
    assert torch.equal(tables["q"].out_permutation, rows)
    apart = {table.name: table for table in sfmp(reorder="per_matrix").score(block).tables}
    assert not torch.equal(apart["k"].in_permutation, expected)


@pytest.mark.parametrize("reorder", ["shared", "folded"])
def test_an_inner_order_is_folded_and_stored_nowhere(reorder: str) -> None:
    shapes = {"gate": (40, 24), "up": (40, 24), "down": (24, 40)}
    tie = Tie("down", {"gate": 1, "up": 1}, 40, 40, 1)
    block = random_block(shapes, ties=(tie,))
    scores = sfmp(reorder=reorder).score(block)
    worth = block.fisher["gate"].sum(1) + block.fisher["up"].sum(1) + block.fisher["down"].sum(0)
    order = worth.argsort(descending=True, stable=True)
    assert torch.equal(scores.ties["down"], order)
    tables = {table.name: table for table in scores.tables}
    assert tables["down"].in_permutation is None
    assert tables["gate"].out_permutation is tables["up"].out_permutation is None
    assert (tables["gate"].in_permutation is None) == (reorder == "folded")
    sums = block.fisher["gate"][order][:16].sum()
    if reorder == "folded":
        assert float(scores.importance[0][0].sum()) == float(sums)


@pytest.mark.parametrize("repeat", [1, 2])
def test_inside_heads_channels_stay_in_their_head(repeat: int) -> None:
    """With grouped queries each head of v feeds `repeat` heads of o's columns."""
    tie = Tie("o", {"v": 1}, 24, 8, repeat)
    block = random_block({"v": (24, 20), "o": (20, 24 * repeat)}, ties=(tie,))
    order = sfmp(reorder="folded").score(block).ties["o"]
    columns = block.fisher["o"].sum(0).view(3, repeat, 8).sum(1).flatten()
    worth = block.fisher["v"].sum(1) + columns
    for head in range(3):
        inside = order[8 * head : 8 * head + 8]
        assert sorted(inside.tolist()) == list(range(8 * head, 8 * head + 8))
        assert worth[inside].tolist() == sorted(worth[inside].tolist(), reverse=True)


def test_two_copies_of_gate_and_up_in_one_matrix_follow_one_order() -> None:
    tie = Tie("down", {"gate_up": 2}, 16, 16, 1)
    block = random_block({"gate_up": (32, 20), "down": (20, 16)}, ties=(tie,))
    scores = sfmp(reorder="folded", tile_out=1, tile_in=20).score(block)
    order = scores.ties["down"]
    rows = block.fisher["gate_up"].sum(1)
    worth = rows[:16] + rows[16:] + block.fisher["down"].sum(0)
    assert torch.equal(order, worth.argsort(descending=True, stable=True))
    expected = rows[torch.cat([order, order + 16])]
    assert torch.equal(scores.importance[0][:, 0], expected.double())


def test_tiles_larger_than_every_matrix_make_sfmp_layerwise() -> None:
    block = random_block({"a": (48, 64), "b": (32, 64), "c": (64, 32)})
    large = sfmp(tile_out=512, tile_in=512, reorder="none")
    alike = Layerwise(formats=NAMES, base="nearest")
    for share in (0.2, 0.5, 0.8):
        ours, theirs = plan(large, block, share), plan(alike, block, share)
        for name, layer in theirs.items():
            assert len(layer.formats) == 1
            assert ours[name].formats == layer.formats
            assert ours[name].nbytes == layer.nbytes


# The published sizes of Llama-3.1-8B, from shapes alone

BLOCKS, HIDDEN, INNER, KEYS, VOCABULARY = 32, 4096, 14336, 1024, 128256
SHAPES = {
    "q": (HIDDEN, HIDDEN),
    "k": (KEYS, HIDDEN),
    "v": (KEYS, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
WEIGHTS = 6_979_321_856
GIB = 2**30


@pytest.mark.parametrize(
    ("code_bits", "published"), [(2.25, 3.99), (2.75, 4.39), (3.25, 4.80), (3.75, 5.20)]
)
def test_the_size_table_of_the_paper(code_bits: float, published: float) -> None:
    """The release counts 32 bits a group, fp16 scale and zero, and no permutation or map.

    We store whole zero points: (16 + bits) a group of 128; what we count beside that is the map
    and the scale of a tensor, under 0.001 bits per weight at tiles of 512 x 128.
    """
    assert sum(rows * columns for rows, columns in SHAPES.values()) * BLOCKS == WEIGHTS
    fp16 = 2 * 2 * VOCABULARY * HIDDEN
    released = WEIGHTS * (code_bits + 32 / 128) / 8 + fp16
    assert abs(released / GIB - published) < 0.01  # two decimals, some cut off, some rounded

    low = int(code_bits)
    share = code_bits - low
    names = (f"int{low}-g128", f"int{low + 1}-g128")
    ours = 0
    for shape in SHAPES.values():
        tile = clip_tile(shape, (512, 128))
        tiles = torch.zeros(grid_shape(shape, tile), dtype=torch.uint8)
        tiles.view(-1)[: round(share * tiles.numel())] = 1
        ours += BLOCKS * LayerAllocation(shape, tile, names, tiles).nbytes
    exact = WEIGHTS * (code_bits + (16 + code_bits) / 128) / 8
    assert exact <= ours <= exact + 0.001 * WEIGHTS / 8
    assert ours + fp16 < released


@pytest.mark.parametrize("orders", [False, True])
def test_what_permutations_cost(orders: bool) -> None:
    """Both orders of every matrix, as published, in 16 bits: half of the release's 0.012 bits."""
    total = 0
    for rows, columns in SHAPES.values():
        sides = (torch.arange(columns), torch.arange(rows)) if orders else (None, None)
        total += BLOCKS * uniform((rows, columns), "int3-g128", *sides).nbytes
    extra = sum(2 * (rows + columns) for rows, columns in SHAPES.values()) * BLOCKS
    plain = WEIGHTS * (3 + (16 + 3) / 128) / 8 + 4 * len(SHAPES) * BLOCKS
    assert total == plain + (extra if orders else 0)
    assert 8 * extra / WEIGHTS == pytest.approx(0.006, abs=0.0005)


# RTN


def shaped(shapes: dict[str, tuple[int, int]]) -> BlockView:
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return BlockView(weights, Structure((), ()))


def test_rtn_takes_the_best_format_that_fits() -> None:
    """More bits first, then smaller groups; checked against a search over the ladder."""
    block = shaped({"a": (256, 512), "b": (512, 256)})
    scores = Rtn().score(block)
    weights = 2 * 256 * 512
    for bits in (1.06, 2.0, 2.3, 3.3, 4.2, 5.1, 8.2, 8.5, 8.76):
        budget = int(bits * weights / 8)
        layers = Rtn().allocate([scores], budget)
        chosen = layers["a"].formats[0]
        fitting = [
            name
            for name in LADDER
            if uniform((256, 512), name).nbytes + uniform((512, 256), name).nbytes <= budget
        ]
        best = max(fitting, key=LADDER.index)
        assert (chosen, layers["b"].formats[0]) == (best, best)
    assert chosen == "int8-g32"


def test_rtn_ladder_climbs_by_bits_then_by_smaller_groups() -> None:
    keys = [(formats.get(name).bits, -(formats.get(name).group or 10**6)) for name in LADDER]
    assert keys == sorted(keys)
    assert len(set(LADDER)) == len(LADDER) == 32


def test_rtn_refuses_what_its_widest_format_cannot_use() -> None:
    scores = Rtn().score(shaped({"a": (64, 64)}))
    with pytest.raises(BudgetError, match=r"at most 4,484 bytes .* int8-g32\), not 5,120"):
        Rtn().allocate([scores], 5120)


def test_rtn_refuses_what_one_bit_cannot_reach() -> None:
    scores = Rtn().score(shaped({"a": (64, 64)}))
    with pytest.raises(BudgetError, match=r"at least 652 bytes .* with int1, not 600"):
        Rtn().allocate([scores], 600)
    assert Rtn().allocate([scores], 652)["a"].formats == ("int1-g64",)  # no larger on 64 columns
    fixed = Rtn(format="int4-g32")
    scores = fixed.score(shaped({"a": (64, 64)}))
    with pytest.raises(BudgetError, match="with int4-g32, not 600"):
        fixed.allocate([scores], 600)


@pytest.mark.parametrize("kind", [Rtn, Gptq])
def test_a_misspelt_format_is_refused_at_once(kind: type[Method]) -> None:
    with pytest.raises(ValueError, match="int9-g3"):
        kind(format="int9-g3")  # type: ignore[call-arg]


# GPTQ


def correlated(inputs: int, tokens: int = 400) -> Tensor:
    """Make a Hessian as inputs that hang together give it."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    return x.t() @ x


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("name", ["int2-g16", "int3", "int4-g32-sym", "fp8-e4m3-g16"])
def test_gptq_loses_less_in_the_output_than_rtn(
    name: str, act_order: bool, static_groups: bool
) -> None:
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    hessian = correlated(80)
    method = Gptq(format=name, act_order=act_order, static_groups=static_groups)
    layer = method.allocate([method.score(shaped({"w": (48, 80)}))], 10**6)["w"]
    packed = method.quantize("w", weight, layer, LayerStatistics(hessian))
    assert packed.nbytes == layer.nbytes
    assert (packed.in_permutation is not None) == (act_order and not static_groups)
    ours = packed.dequantize()
    plain = (
        Rtn(format=name)
        .quantize("w", weight, uniform((48, 80), name), LayerStatistics())
        .dequantize()
    )
    assert rounding.output_error(weight, ours, hessian) < 0.8 * rounding.output_error(
        weight, plain, hessian
    )


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_rtn_where_inputs_do_not_hang_together(act_order: bool) -> None:
    """A diagonal Hessian moves no error onto other columns."""
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    hessian = torch.diag(torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1)
    layer = uniform((32, 48), "int3-g16")
    method = Gptq(format="int3-g16", act_order=act_order)
    ours = method.quantize("w", weight, layer, LayerStatistics(hessian))
    plain = Rtn(format="int3-g16").quantize("w", weight, layer, LayerStatistics())
    assert torch.equal(ours.codes, plain.codes)
    assert torch.equal(ours.dequantize(), plain.dequantize())


def test_gptq_of_an_expert_without_tokens_is_rtn() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    layer = uniform((32, 48), "int3-g16")
    ours = Gptq().quantize("w", weight, layer, LayerStatistics(torch.zeros(48, 48)))
    plain = Rtn().quantize("w", weight, layer, LayerStatistics())
    assert torch.equal(ours.dequantize(), plain.dequantize())


# Choices


@pytest.mark.parametrize(
    ("name", "choices", "message"),
    [
        ("sfmp", {"formats": ()}, "formats must be at least one name"),
        ("sfmp", {"formats": ("int2", "int2")}, "formats must be distinct"),
        ("sfmp", {"formats": ("int0",)}, "int0"),
        ("sfmp", {"formats": ("bf16",), "score_by": "fisher"}, "Use score 'fisher_error'"),
        ("sfmp", {"formats": ("pruned", "int2"), "score_by": "fisher"}, "not 'pruned'"),
        ("sfmp", {"score_by": "hessian"}, "score must be one of fisher, fisher_error"),
        ("sfmp", {"solver": "grid"}, "solver must be one of lagrangian, two_level"),
        ("sfmp", {"reorder": "sorted"}, "reorder must be one of none, per_matrix"),
        ("sfmp", {"tile_out": 0}, "tile_out must be at least 1, not 0"),
        ("sfmp", {"tile_in": -8}, "tile_in must be at least 1, not -8"),
        ("sfmp", {"base": "round"}, "base must be one of nearest, awq, gptq"),
        ("sfmp", {"damping": 0.0}, "damping must be between 0 and 1"),
        ("layerwise", {"formats": ()}, "formats must be at least one name"),
        ("layerwise", {"base": "awp"}, "base must be one of"),
        ("gptq", {"damping": 1.0}, "damping must be between 0 and 1"),
        ("gptq", {"damping": float("nan")}, "damping must be between 0 and 1"),
    ],
)
def test_a_wrong_choice_is_refused_before_any_work(
    name: str, choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get(name)(**choices)


def test_what_each_base_needs_is_measured() -> None:
    assert sfmp(base="nearest").block_statistics == ()
    assert sfmp(base="gptq").block_statistics == ("hessian",)
    assert sfmp(base="awq").block_statistics == ("hessian", "activation")
    assert Gptq().statistics == Rtn().statistics == Rtn().block_statistics == ()


def test_scores_are_kept_for_other_bases_and_solvers_only() -> None:
    parameters = sfmp().score_parameters()
    for change in ({"base": "gptq"}, {"solver": "two_level"}, {"damping": 0.1}):
        assert sfmp(**change).score_parameters() == parameters
    for change in (
        {"reorder": "none"},
        {"tile_out": 8},
        {"tile_in": 32},
        {"score_by": "fisher"},
        {"formats": ("int2-g16",)},
    ):
        assert sfmp(**change).score_parameters() != parameters
