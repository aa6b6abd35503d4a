"""The demo with fewer methods, windows and modules: its table, its file, and its choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitmosaic import checkpoint
from bitmosaic.cli import app, demo
from bitmosaic.evaluation import text


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo short: 4 windows of the first modules of each split, one budget."""
    documents = text.stdlib_documents
    monkeypatch.setattr(text, "stdlib_documents", lambda split: documents(split)[:20])
    monkeypatch.setattr(demo, "CALIBRATION_WINDOWS", 4)
    monkeypatch.setattr(demo, "EVALUATION_WINDOWS", 4)
    monkeypatch.setattr(demo, "TOKENS", 4)
    monkeypatch.setattr(demo, "BUDGETS", (3.0,))
    monkeypatch.setattr(
        demo,
        "VARIANTS",
        {name: demo.VARIANTS[name] for name in ("rtn", "layerwise, nearest", "sfmp, nearest")},
    )
    monkeypatch.setattr(demo, "FLOATS", {"fgmp": demo.FLOATS["fgmp"]})
    monkeypatch.setattr(demo, "FLOAT_BUDGETS", (5.65,))


@pytest.mark.usefixtures("short")
def test_demo(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    shown = CliRunner().invoke(app, ["demo", "--output", str(output), "--threads", "1"])
    assert shown.exit_code == 0, (shown.stderr, shown.exception)
    rows = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in rows] == [
        "original",
        "rtn",
        "layerwise, nearest",
        "sfmp, nearest",
        "fgmp",
    ]
    original, *quantized = rows
    assert (original["kl"], original["bits_asked"]) == (0.0, None)
    for row in quantized:
        directory = Path(row["directory"])
        files = checkpoint.tensor_files(directory)
        assert row["bytes"] == sum(file.stat().st_size for file in files) < original["bytes"]
        assert row["bits_per_weight"] <= row["bits_asked"]
        assert row["kl"] > 0
        assert f"{row['bytes']:,}" in shown.stdout
        assert f"{row['perplexity']:.2f}" in shown.stdout
    # Budgets that are met to a thousandth, and more freedom in spending them is worth something.
    by_method = {row["method"]: row for row in quantized}
    assert by_method["sfmp, nearest"]["bits_per_weight"] > 0.998 * 3.0
    assert (
        by_method["sfmp, nearest"]["kl"]
        < by_method["layerwise, nearest"]["kl"]
        < by_method["rtn"]["kl"]
    )
    assert "def read_file(path):" in shown.stdout
    assert shown.stdout.rstrip() == shown.stdout.rstrip().replace("<s>", "")

    again = CliRunner().invoke(app, ["demo", "--output", str(output), "--threads", "1"])
    assert again.exit_code == 0, (again.stderr, again.exception)
    repeated = json.loads((output / "results.json").read_text())
    for row in (*rows, *repeated):
        row.pop("seconds")
    assert repeated == rows


def row(method: str, size: int, kl: float) -> demo.Row:
    return demo.Row(method, 3.0, size, 3.0, 20.0, kl, 1.0, method)


def test_the_smallest_good_model_is_chosen() -> None:
    rows = [row("large", 30, 0.01), row("small", 20, 0.09), row("bad", 10, 0.1)]
    assert demo.choose(rows).method == "small"
    assert demo.choose(rows[2:]).method == "bad"
    assert demo.choose([row("a", 10, 0.3), row("b", 20, 0.2)]).method == "b"
