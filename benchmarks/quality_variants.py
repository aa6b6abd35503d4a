"""The methods that quality.py compares, in their modes."""

from __future__ import annotations

from typing import Any

from bitmosaic.methods import cmpq, septq

ONE_TO_FOUR = ("int1-g128-sym", "int2-g128", "int3-g128", "int4-g128")
TILES = {"tile_out": 128, "widths": True}
PER_CHANNEL = tuple(f"int{bits}" for bits in range(2, 9))

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "rtn": {"default": {}},
    "gptq": {
        "default": {},
        "per_channel": {"format": PER_CHANNEL},
        "search": {"shrinks": 80},
    },
    "layerwise": {
        "default": {},
        "nearest": {"base": "nearest"},
        # Per-channel GPTQ at the same bytes as the others, which one width alone cannot meet.
        "per_channel": {"formats": PER_CHANNEL},
        "one_to_four": {"formats": ONE_TO_FOUR},
    },
    "sfmp": {
        "default": {},
        "one_to_four": {"formats": ONE_TO_FOUR},
        "nearest": {"base": "nearest"},
        "paper": {
            "score_by": "fisher",
            "solver": "two_level",
            "reorder": "per_matrix",
            "tile_out": 512,
            "base": "awq",
        },
        "awq": {"base": "awq"},
        "gptq_in_order": {"act_order": False},
        "nearest_fisher": {"base": "nearest", "score_by": "fisher"},
        "nearest_two_level": {"base": "nearest", "solver": "two_level"},
        "nearest_per_matrix": {"base": "nearest", "reorder": "per_matrix"},
        "nearest_shared": {"base": "nearest", "reorder": "shared"},
        "nearest_unsorted": {"base": "nearest", "reorder": "none"},
        "nearest_tile512": {"base": "nearest", "tile_out": 512},
        "nearest_tile32": {"base": "nearest", "tile_out": 32},
    },
    "septq": {
        "paper": septq.PAPER,
        "improved": {},
        "share_0": {"outlier_fraction": 0.0},
        "share_0.05": {"outlier_fraction": 0.0005},
        "share_0.45": {"outlier_fraction": 0.0045},
        "share_1": {"outlier_fraction": 0.01},
        "rescored": {"rescore": True},
        "mask_from_calibration": {"mask_from": "calibration"},
        "score_paper": {"score_by": "paper"},
        "layer_budget": {"scope": "layer"},
        "one_format": {"choose": "model"},
        "not_refitted": {"refit": False},
        "grids_with_outliers": {"alternations": 0},
        "extreme_grids": {"shrinks": 1},
        "searched_grids": {"shrinks": 20},
        "fp16_outliers": {"outlier_format": "fp16"},
        "in_order": {"act_order": False},
    },
    "cmpq": {
        "paper": cmpq.PAPER,
        "improved": {},
        "nearest": {"base": "nearest"},
        "paper_adjacent": {**cmpq.PAPER, "widths": "adjacent"},
        "paper_gain": {**cmpq.PAPER, "widths": "gain"},
        "paper_compensated": {**cmpq.PAPER, "base": "gptq"},
        "paper_share_0": {**cmpq.PAPER, "act_outliers": 0.0, "weight_outliers": 0.0},
        "paper_share_0.05": {**cmpq.PAPER, "weight_outliers": 0.0005},
        "paper_share_1": {**cmpq.PAPER, "weight_outliers": 0.01},
        "share_0.05": {"weight_outliers": 0.0005},
        "share_0.45": {"weight_outliers": 0.0045},
        "share_1": {"weight_outliers": 0.01},
        "kept_in_channels": {"act_outliers": 0.0005},
        "plain_kmeans": {"weighted": False},
        "activation": {"sensitivity": "activation"},
        "layer_budget": {"scope": "layer"},
        "tile_in_2": {"tile_in": 2},
        "tile_in_4": {"tile_in": 4},
        "tile_in_8": {"tile_in": 8},
    },
    "toga": {
        "default": {},
        "nearest": {"base": "nearest"},
        "w1.6": {"formats": ("w1.6",)},
        "w3.2": {"formats": ("w3.2",)},
        "one_to_four": {"formats": ONE_TO_FOUR},
        "pruned": {"formats": ("pruned", "int2-g128", "int3-g128", "int4-g128")},
        "shared": {"shared": True},
        "unsorted": {"reorder": "none"},
        "one_two": {"formats": ("int1-g128-sym", "int2-g128")},
        "by_tiles": {"act_order": False},
        "one_sweep": {"low_first": False},
        "tile_in_64": {"tile_in": 64},
        # Widths, tiles and bits under one budget, and its rival: prune, then one width for all.
        "joint": {"formats": ("pruned", *ONE_TO_FOUR), **TILES},
        "joint_learned": {"formats": ("pruned", *ONE_TO_FOUR), **TILES, "search": "learned"},
        "prune_then_2": {"formats": ("pruned", "int2-g128"), **TILES},
        "prune_then_3": {"formats": ("pruned", "int3-g128"), **TILES},
        "prune_then_4": {"formats": ("pruned", "int4-g128"), **TILES},
        "prune_alone": {"formats": ("pruned", "int8-g128"), **TILES},
        "learned": {"search": "learned"},
        "one_to_four_learned": {"formats": ONE_TO_FOUR, "search": "learned"},
    },
}
"""Methods and their modes.  `default` or `improved` is what a user gets, `paper` what was published
as far as it is known; the others are ablations.  A method that is added needs its entry here, with
those of its modes that MODES names, and nothing else."""

MODES = ("default", "per_channel", "nearest", "paper", "improved")
"""The modes of the table; the others are run where they are named, or by --modes all."""
