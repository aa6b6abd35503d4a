"""Calibration windows, the sketch of their text, generation, and the progress display."""

from __future__ import annotations

import base64
import io
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from architectures import tiny, tokens
from bitmosaic.cli import progress
from bitmosaic.cli.progress import Reporter
from bitmosaic.evaluation.calibration import open_calibration
from bitmosaic.evaluation.generation import generate
from bitmosaic.evaluation.overlap import SKETCH, overlap, sketch, sketched_overlap

MODEL = Path(__file__).parents[2] / "src/bitmosaic/data/stdlib-llama"


def words(count: int, seed: int) -> str:
    chosen = random.Random(seed)
    return " ".join(f"{chosen.randrange(10**6):06}" for _ in range(count))


# Windows


def test_windows_are_chosen_by_seed_in_text_order(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(words(600, 0))
    chosen = [open_calibration(MODEL, file, samples=5, seqlen=32, seed=seed) for seed in (0, 0, 1)]
    assert chosen[0].tokens.shape == (5, 32)
    assert torch.equal(chosen[0].tokens, chosen[1].tokens)
    assert chosen[0].facts == chosen[1].facts
    assert not torch.equal(chosen[0].tokens, chosen[2].tokens)
    assert chosen[0].facts["digest"] == chosen[2].facts["digest"]
    assert chosen[0].facts["sketch"] != chosen[2].facts["sketch"]
    content = file.read_text()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    places = [content.index(tokenizer.decode(window)) for window in chosen[0].tokens]
    assert places == sorted(places)


def test_windows_default_to_the_context(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(words(600, 0))
    assert open_calibration(MODEL, file, samples=2).tokens.shape == (2, 256)
    with pytest.raises(ValueError, match="context of 256 tokens, not 257"):
        open_calibration(MODEL, file, samples=2, seqlen=257)
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        open_calibration(MODEL, file, samples=0)


# Sketches


def test_sketch_of_a_short_text_is_exact() -> None:
    text = words(100, 0)
    other = words(100, 1)
    kept = sketch([text])
    half = [text[:300] + other]
    assert sketched_overlap(kept, half) == overlap([text], half) > 0
    assert sketched_overlap(kept, [text]) == 1.0
    assert sketched_overlap(kept, [other]) == 0.0
    assert sketched_overlap(kept, []) == 0.0
    assert sketched_overlap(sketch([]), [text]) == 0.0


def test_sketch_of_a_long_text_estimates() -> None:
    text, other = words(10_000, 0), words(10_000, 1)
    evaluated = [text[:20_000] + other]
    exact = overlap([text], evaluated)
    seen = len(evaluated[0]) * SKETCH / len(text)
    error = math.sqrt(exact * (1 - exact) / seen)
    # Four standard errors: a sample that bad has a chance below 1 in 10,000, and it is fixed.
    assert abs(sketched_overlap(sketch([text]), evaluated) - exact) < 4 * error
    assert len(base64.b64decode(sketch([text]))) == 8 * SKETCH


# Generation


class Letters:
    """A tokenizer whose tokens are characters."""

    bos_token_id: int | None = 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(each) for each in text]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_greedy_generation_is_that_of_transformers(name: str) -> None:
    model = tiny(name)
    prompt = tokens(1, 7)
    model.generation_config.eos_token_id = None
    wanted = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
    )
    found = generate(model, Letters(), "".join(map(chr, prompt[0].tolist())), tokens=20)
    assert [ord(each) for each in found.text] == wanted[0, 7:].tolist()
    assert found.tokens == 20
    # The end token ends it, and is not told.
    end = int(wanted[0, 12])
    model.generation_config.eos_token_id = [end]
    stopped = generate(model, Letters(), found.prompt, tokens=20)
    assert stopped.text == found.text[: wanted[0, 7:].tolist().index(end)]


def test_generation_ends_with_the_context() -> None:
    model = tiny("gpt2")
    model.generation_config.eos_token_id = None
    found = generate(model, Letters(), "A" * 60, tokens=20)
    assert found.tokens == 5  # 64 positions, and the last token needs none
    assert generate(model, Letters(), "", tokens=3).tokens == 3  # begins with the BOS token
    for prompt, options, match in (
        ("A" * 65, {}, "at most the model's context of 64 tokens, not 65"),
        ("a", {}, "vocabulary \\[0, 96\\), not 97"),
        ("A", {"tokens": 0}, "tokens must be at least 1"),
        ("A", {"temperature": -1.0}, "temperature must be at least 0"),
        ("A", {"temperature": math.nan}, "temperature must be at least 0"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, Letters(), prompt, **options)


def test_generation_without_a_beginning() -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    with pytest.raises(ValueError, match="prompt must have at least 1 token"):
        generate(tiny("llama"), tokenizer, "")


# Progress


def test_bars_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Reporter(console) as reporter:
        assert list(reporter.track("abc", "letters", 3)) == ["a", "b", "c"]
        counter = reporter.counter("count")
        for done in (1, 2):
            counter(done, 2)
        assert reporter._bars is not None
        assert reporter._bars.tasks == []
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "letters" in shown
    assert "3" in shown


def test_plain_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Reporter(Console(file=io.StringIO())) as reporter:
        for _ in reporter.track(range(1000), "steps", 1000):
            clock[0] += 3.7
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    # A line every third step, which is the first past 10 seconds.
    assert lines[:2] == ["steps 3/1000, 1:01:29 left", "steps 6/1000, 1:01:18 left"]
    assert len(lines) == 333
