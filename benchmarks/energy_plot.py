"""Draw perplexity over relative energy and over memory, a row of panels a model, from fgmp.json.

    python benchmarks/energy_plot.py benchmarks/results/fgmp.json docs/fgmp.svg

Needs matplotlib (`make plot-energy` installs it).  A line is a policy at several shares of FP4,
from all-FP8 (a circle) to all-FP4 (a square): its own where there are such rows, else another's.
A model without shares (FP16) is a level.  Energies are relative to all-FP8; what each is worth
stands below its axis.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

AXES = {
    "energy_calibrated": "relative energy\n(calibrated to the published point, not measured)",
    "energy_synthesis": "relative energy of dot products\n(own RTL in a 180 nm library)",
    "bits_per_weight": "bits_per_weight\n(the files, everything counted)",
}
"""What perplexity is drawn over, and what that is worth."""
COLOURS = {
    "fisher": "tab:blue",
    "qerr": "tab:orange",
    "output_err": "tab:green",
    "amax": "tab:red",
    "variance": "tab:purple",
    "random": "tab:gray",
}
"""Policies that have a colour of their own; others take what is left, in order of occurrence."""
SPARE = ("tab:brown", "tab:olive", "tab:cyan", "tab:pink", "black")
STYLES = {"w": ":", "w+a": "-", "a": "--"}


def main() -> None:
    """Read the rows, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    rows: Rows = json.loads(options.rows.read_text())
    models = list(dict.fromkeys(row["model"] for row in rows))
    # Without these two the same rows would give other bytes each time.
    pyplot.rcParams["svg.hashsalt"] = "bitmosaic"
    metadata = {"Date": None} if options.output.suffix == ".svg" else None
    figure, panels = pyplot.subplots(
        len(models),
        len(AXES),
        figsize=(4.2 * len(AXES), 3.4 * len(models) + 0.8),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    colours = colours_of(rows)
    for line, model in zip(panels, models, strict=True):
        for panel, axis in zip(line, AXES, strict=True):
            draw(panel, axis, [row for row in rows if row["model"] == model], colours)
        line[0].set_ylabel(f"{model}\nperplexity")
    for panel, label in zip(panels[-1], AXES.values(), strict=True):
        panel.set_xlabel(label)
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    shown = {label: line for label, line in handles.items() if not label.startswith("_")}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(options.output, metadata=metadata, dpi=150)


def colours_of(rows: Rows) -> dict[str, str]:
    """Give each policy its colour."""
    others = dict.fromkeys(
        row["policy"] for row in rows if is_mixed(row) and row["policy"] not in COLOURS
    )
    return COLOURS | dict(zip(others, SPARE * len(others), strict=False))


def is_mixed(row: dict[str, Any]) -> bool:
    """Whether both formats occur, so that a policy has decided."""
    return row.get("share") is not None and 0 < row["share"] < 1


def end_of(points: Rows, policy: str, share: int) -> Rows:
    """Return the row at which a policy's line ends, if there is one."""
    there = [row for row in points if row.get("share") == share]
    return ([row for row in there if row["policy"] == policy] or there)[:1]


def draw(panel: Axes, axis: str, rows: Rows, colours: dict[str, str]) -> None:
    """Draw one model's lines, their common ends, and levels."""
    for policy, mode in dict.fromkeys(
        (row["policy"], row["mode"]) for row in rows if is_mixed(row)
    ):
        points = [row for row in rows if row["mode"] == mode and row.get(axis) is not None]
        between = [row for row in points if is_mixed(row) and row["policy"] == policy]
        ends = [end for share in (0, 1) for end in end_of(points, policy, share)]
        found = sorted((row["share"], row[axis], row["perplexity"]) for row in ends + between)
        if between:
            _, x, y = zip(*found, strict=True)
            label = f"{policy}, {mode}"
            style = STYLES.get(mode, "-.")
            panel.plot(x, y, color=colours[policy], linestyle=style, marker=".", label=label)
    for share, marker, name in ((0, "o", "all-FP8"), (1, "s", "all-FP4")):
        ends = [row for row in rows if row.get("share") == share and row.get(axis) is not None]
        panel.plot(
            [row[axis] for row in ends],
            [row["perplexity"] for row in ends],
            color="black",
            linestyle="",
            marker=marker,
            markersize=4,
            label=name,
        )
    for row in rows:
        if row.get("share") is None:
            label = row["policy"]
            panel.axhline(row["perplexity"], color="black", linewidth=0.8, alpha=0.5, label=label)
    panel.grid(visible=True, alpha=0.25)


if __name__ == "__main__":
    main()
