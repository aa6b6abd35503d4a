"""tools/train_stdlib_llama.py: a few steps of a tiny model."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_stdlib_llama as tool
from bitmosaic.evaluation import perplexity, token_windows

TEXT = ["def add(x, y):\n    return x + y\n" * 30, "class A:\n    pass\n" * 40]
TINY = tool.Recipe(
    steps=6, batch=2, seqlen=16, blocks=2, width=16, heads=2, vocabulary=300, warmup=2
)


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


class Interrupted(Exception):
    """Stands for whatever stops a run."""


def test_a_resumed_training_gives_the_bytes_of_an_uninterrupted_one(tmp_path, monkeypatch):
    tool.train(TINY, tmp_path / "whole", TEXT)

    advance = tool.Training.advance

    def interrupted(training, tokens):
        if training.step == 5:  # the state was saved after step 4 (index 3)
            raise Interrupted
        return advance(training, tokens)

    monkeypatch.setattr(tool.Training, "advance", interrupted)
    with pytest.raises(Interrupted):
        tool.train(TINY, tmp_path / "parts", TEXT, save_every=2)
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(
        tool.Training, "advance", lambda *both: seen.append(both[0].step) or advance(*both)
    )
    tool.train(TINY, tmp_path / "parts", TEXT, save_every=2)
    assert seen == [4, 5]
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert not (tmp_path / "parts" / tool.STATE).exists()


def test_training_learns_and_the_result_loads_like_any_model(tmp_path):
    recipe = dataclasses.replace(TINY, steps=60)
    tool.train(recipe, tmp_path, TEXT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer(TEXT[0])["input_ids"]) == TEXT[0]
    windows = token_windows(tokenizer, TEXT, recipe.seqlen, bos_each=True)
    # An untrained model is at the size of the vocabulary, of which this text needs few.
    assert perplexity(model, windows).perplexity < len(tokenizer) / 4


def test_a_state_of_another_recipe_is_refused(tmp_path):
    tool.Training(TINY).save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"rate of the saved training must be 0\.1, not 0\.002"):
        tool.Training(dataclasses.replace(TINY, rate=0.1)).load(tmp_path / "state")


def test_the_defaults_are_those_of_the_embedded_model():
    training = tool.Training(tool.Recipe())
    assert sum(each.numel() for each in training.parameters.values()) == 5_770_496
    rates = [tool.Recipe().rate_at(step) for step in (0, 99, 100, 3678)]
    assert rates[:3] == [2e-5, 2e-3, 2e-3]
    assert 0.02 * 2e-3 <= rates[3] < 0.0201 * 2e-3
