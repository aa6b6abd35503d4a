"""Draw KL over bits_per_weight of every method, a panel for each model, from quality.json.

    python benchmarks/plot.py benchmarks/results/quality.json docs/quality.svg

Needs matplotlib (`make plot` installs it).  Each point lies at the bits that were really stored.
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

LINES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("rtn", "default"): ("tab:gray", ":", "rtn"),
    ("gptq", "default"): ("tab:brown", "-", "gptq"),
    ("layerwise", "per_channel"): ("tab:brown", "--", "gptq per channel, widths by matrix"),
    ("layerwise", "default"): ("tab:olive", "-", "layerwise"),
    ("sfmp", "paper"): ("tab:blue", "--", "sfmp, paper"),
    ("sfmp", "default"): ("tab:blue", "-", "sfmp"),
    ("cmpq", "paper"): ("tab:red", "--", "cmpq, paper"),
    ("cmpq", "improved"): ("tab:red", "-", "cmpq"),
    ("septq", "paper"): ("tab:green", "--", "septq, paper"),
    ("septq", "improved"): ("tab:green", "-", "septq"),
}
"""What is drawn, in the order of the legend: colour, line, label."""


def main() -> None:
    """Read the rows, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())
    models = list(dict.fromkeys(row["model"] for row in rows))
    # Without these two the same rows would give other bytes each time.
    pyplot.rcParams["svg.hashsalt"] = "bitmosaic"
    metadata = {"Date": None} if options.output.suffix == ".svg" else None
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(4.2 * len(models), 4.4), squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[0], models, strict=True):
        draw(panel, model, [row for row in rows if row["model"] == model])
    panels[0][0].set_ylabel("KL(original ‖ packed), nats a token")
    handles = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    labels = [label for *_, label in LINES.values() if label in handles]
    ordered = [handles[label] for label in labels]
    figure.legend(ordered, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(options.output, metadata=metadata, dpi=150)


def draw(panel: Axes, model: str, rows: list[dict[str, Any]]) -> None:
    """Draw one model's lines on logarithmic KL."""
    for (method, mode), (colour, style, label) in LINES.items():
        found = {
            (row["bits_per_weight"], row["kl"])
            for row in rows
            if (row["method"], row["mode"]) == (method, mode)
        }
        if found:
            bits, kl = zip(*sorted(found), strict=True)
            panel.plot(bits, kl, color=colour, linestyle=style, marker=".", label=label)
    panel.set_title(model)
    panel.set_xlabel("bits_per_weight, everything counted")
    panel.set_yscale("log")
    panel.grid(visible=True, which="both", alpha=0.25)


if __name__ == "__main__":
    main()
