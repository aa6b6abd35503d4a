"""A finished output that the same call is given for: is it of the same run?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitmosaic import checkpoint
from bitmosaic.allocation import Allocation, Budget
from bitmosaic.evaluation.calibration import CalibrationText
from bitmosaic.methods import Method
from bitmosaic.model.source import Source
from bitmosaic.pipeline.common import read_json, tokens_digest


def finished_request(
    source: Source,
    method: Method,
    budget: Budget | None,
    allocation: Allocation | None,
    text: CalibrationText | None,
    embedding: str,
    head: str,
) -> dict[str, Any]:
    """What recipe.json of the finished output must say."""
    assert budget is not None or allocation is not None
    asked = str(budget) if allocation is None else allocation.recipe.get("budget")
    request: dict[str, Any] = {
        "model": source.digest,
        "method": method.name,
        "parameters": method.parameters(),
        "budget": asked,
        "embedding": embedding,
        "head": head,
    }
    if text is not None:
        request["tokens"] = tokens_digest(text.tokens)
    return request


def open_finished(output: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of a finished output of the same run, or refuse another's."""
    checkpoint.open_packed(output)
    facts = read_json(output / "recipe.json")
    found = {**facts, "tokens": facts.get("calibration", {}).get("tokens")}
    differing = sorted(key for key, value in request.items() if found.get(key) != value)
    if differing:
        raise FileExistsError(
            f"{output} must be of the same run to resume it, but it differs in "
            f"{', '.join(differing)}. Give another output, or --overwrite to replace it."
        )
    return {**facts, "already_complete": True}
