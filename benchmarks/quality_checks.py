"""What is asked of the figures of `quality.py`, on the embedded model."""

from __future__ import annotations

from typing import Any

Check = tuple[str, float, float, bool]
"""What, the figure, what it must not exceed, whether it does not."""


def checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Compare methods at each budget for which both were measured."""
    table = {
        (row["method"], row["mode"], row["bits_asked"]): row
        for row in rows
        if row["model"] == "stdlib-llama"
    }
    budgets = sorted({bits for *_, bits in table})
    found = []
    for bits in budgets:
        for mode in ("default", "nearest"):
            found += _beats_layerwise(table, mode, bits)
        for method in ("cmpq", "septq"):
            # Improved modes are no worse than what was published.
            found += _compare(table, (method, "improved"), (method, "paper"), bits)
        if 2.25 <= bits <= 3.0:
            found += _compare(table, ("septq", "improved"), ("gptq", "default"), bits)
            for other in (("gptq", "per_channel"), ("layerwise", "per_channel")):
                found += _compare(table, ("cmpq", "improved"), other, bits)
    return found


def _beats_layerwise(table: dict[Any, dict[str, Any]], mode: str, bits: float) -> list[Check]:
    """SFMP at or below layerwise, from 2.5 to 3 bits by a tenth of what layerwise loses."""
    row, other = table.get(("sfmp", mode, bits)), table.get(("layerwise", mode, bits))
    if row is None or other is None:
        return []
    margin = 0.1 if 2.5 <= bits <= 3.0 else 0.0
    limit = other["perplexity"] - margin * (other["perplexity"] - other["perplexity_original"])
    name = f"sfmp perplexity, {mode}, {bits:g} bits, layerwise less {margin:.0%} of its loss"
    return [(name, row["perplexity"], limit, row["perplexity"] <= limit)]


def _compare(
    table: dict[Any, dict[str, Any]], ours: tuple[str, str], theirs: tuple[str, str], bits: float
) -> list[Check]:
    """Perplexity and KL at or below another's."""
    row, other = table.get((*ours, bits)), table.get((*theirs, bits))
    if row is None or other is None:
        return []
    name = f"{' '.join(ours)} against {' '.join(theirs)}, {bits:g} bits"
    return [
        (f"{name}, {figure}", row[figure], other[figure], row[figure] <= other[figure])
        for figure in ("perplexity", "kl")
    ]
