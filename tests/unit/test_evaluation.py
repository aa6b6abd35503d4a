"""bitmosaic.evaluation: perplexity, divergence, overlap, records."""

import json
import math
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmosaic.evaluation import (
    divergence,
    evaluate,
    load_model,
    model_digest,
    overlap,
    perplexity,
    stdlib_windows,
    warn_of_overlap,
)
from bitmosaic.evaluation.perplexity import CHUNK_BYTES, batches

EMBEDDED = files("bitmosaic") / "data" / "stdlib-llama"
VOCABULARY = 11
# Unit round-off of float32.
UNIT = 2.0**-24


class Bigram(nn.Module):
    """A language model whose logits are a table row: what it costs is known exactly."""

    def __init__(self, table):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(table)
        self.shapes = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.embedding(input_ids))


def table(seed, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(vocabulary, vocabulary, generator=generator)


def tokens(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator)


def log_probabilities(logits):
    return logits.double().log_softmax(-1)


def rounding(logits):
    """Bound of a float32 log-softmax: n additions, exp and log of 2 units each, 2 subtractions."""
    count = logits.shape[-1]
    return UNIT * (count + 4 + 2 * (2 * float(logits.abs().max()) + math.log(count)))


# Perplexity


def test_perplexity_is_that_of_gptq():
    logits, windows = table(0), tokens(1, 5, 9)
    losses = []
    for window in windows:
        predicted = log_probabilities(logits[window[:-1]])
        losses.append(-predicted[range(8), window[1:]].mean() * 9)
    expected = torch.stack(losses).sum() / (5 * 9)
    result = perplexity(Bigram(logits), windows)
    assert abs(result.nats_per_token - expected) <= rounding(logits)
    assert result.perplexity == math.exp(result.nats_per_token)
    assert (result.tokens, result.windows, result.seqlen) == (40, 5, 9)


def test_sequences_of_any_lengths_weigh_each_token_alike():
    logits = table(0)
    sequences = [tokens(seed, length) for seed, length in enumerate([2, 9, 5, 5, 3])]
    losses = [
        -log_probabilities(logits[each[:-1]])[range(len(each) - 1), each[1:]] for each in sequences
    ]
    expected = torch.cat(losses).mean()
    for batch in (1, 2, 5, None):
        result = perplexity(Bigram(logits), sequences, batch=batch)
        assert abs(result.nats_per_token - expected) <= rounding(logits)
        assert (result.tokens, result.windows, result.seqlen) == (19, 5, 9)


def test_no_position_beyond_the_context_is_asked_for():
    model = Bigram(table(0))
    perplexity(model, tokens(1, 4, 9), batch=3)
    assert model.shapes == [(3, 8), (1, 8)]


def test_positions_scored_in_chunks_cost_the_same():
    vocabulary = CHUNK_BYTES // 4 // 3  # three positions fit into one chunk, eight are asked for
    model = Bigram(torch.zeros(4, vocabulary))
    model.embedding.num_embeddings = vocabulary
    result = perplexity(model, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0]]))
    assert abs(result.nats_per_token - math.log(vocabulary)) <= rounding(torch.zeros(1, vocabulary))
    assert result.tokens == 8


def test_progress_counts_windows_and_the_mode_is_restored():
    model, seen = Bigram(table(0)).train(), []
    perplexity(model, tokens(1, 5, 4), batch=2, progress=lambda *counts: seen.append(counts))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    assert not model.eval().training


def test_the_embedded_model_agrees_with_the_loss_of_transformers():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    windows = stdlib_windows(tokenizer, "heldout", 64, limit=3)
    with torch.no_grad():
        losses = [model(each[None], labels=each[None]).loss for each in windows]
        largest = model(windows).logits
    expected = float(torch.stack(losses).double().mean())
    # transformers, too, takes the softmax in float32.
    assert abs(perplexity(model, windows).nats_per_token - expected) <= 2 * rounding(largest)


def test_the_embedded_model_has_learned_python():
    # Measured on these windows of CPython 3.11.7: 6.98 nats a token by the frequencies of tokens
    # alone, 4.04 by this model. Other versions have other modules: the line is halfway.
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    windows = stdlib_windows(tokenizer, "heldout", 256, limit=4)
    assert perplexity(load_model(EMBEDDED), windows).nats_per_token < 5.5


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (torch.zeros(0, 5, dtype=torch.int64), "at least one, not none"),
        (torch.zeros(2, 1, dtype=torch.int64), r"at least 2 tokens, not of shape \(1,\)"),
        (torch.tensor([[0, VOCABULARY]]), rf"vocabulary \[0, {VOCABULARY}\), not {VOCABULARY}"),
        (torch.tensor([[0, -1]]), "not -1"),
    ],
)
def test_bad_windows_are_refused(windows, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Bigram(table(0)), windows)


def test_a_model_that_gives_nan_is_refused():
    with pytest.raises(ValueError, match="cross-entropy must be finite, not nan"):
        perplexity(Bigram(table(0) * math.nan), tokens(1, 2, 5))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.integers(1, 9))
def test_batches_hold_every_sequence_once(lengths, batch):
    sequences = [tokens(seed, length) for seed, length in enumerate(lengths)]
    found = []
    for inputs, targets in batches(sequences, batch):
        for row, target in zip(inputs, targets, strict=True):
            kept = int((target >= 0).sum())
            found.append([*row[:1].tolist(), *target[:kept].tolist()])
            assert row[1:kept].tolist() == target[: kept - 1].tolist()
    assert sorted(found) == sorted(sequence.tolist() for sequence in sequences)


# Divergence


def test_divergence_is_that_of_the_definition():
    ours, theirs, windows = table(0), table(1), tokens(2, 5, 9)
    inputs = windows[:, :-1].flatten()
    log_p, log_q = log_probabilities(ours[inputs]), log_probabilities(theirs[inputs])
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).sort().values
    result = divergence(Bigram(ours), Bigram(theirs), windows, batch=2)
    # Σ q (log q − log p): each logarithm off by `rounding`, q itself too in relative terms, and the
    # sum of so many terms.
    largest = float((log_q - log_p).abs().max())
    error = rounding(ours) + rounding(theirs)
    bound = error + largest * (error + UNIT * VOCABULARY)
    assert abs(result.kl_mean - expected.mean()) <= bound
    assert abs(result.kl_median - expected[19]) <= bound
    assert abs(result.kl_p99 - expected[39]) <= bound
    assert result.top1_agreement == float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    for result_of, logits in ((result.model, ours), (result.reference, theirs)):
        alone = perplexity(Bigram(logits), windows)
        assert abs(result_of.nats_per_token - alone.nats_per_token) <= 2 * rounding(logits)
        assert (result_of.tokens, result_of.windows) == (40, 5)


def test_a_model_does_not_diverge_from_itself():
    result = divergence(Bigram(table(0)), Bigram(table(0)), [tokens(1, 9), tokens(2, 4)])
    assert (result.kl_mean, result.kl_median, result.kl_p99) == (0, 0, 0)
    assert result.top1_agreement == 1
    assert result.model == result.reference


def test_a_token_that_both_rule_out_costs_nothing():
    logits = table(0)
    logits[:, 3] = -math.inf
    windows = torch.tensor([[0, 1, 2, 4]])
    assert divergence(Bigram(logits), Bigram(logits), windows).kl_mean == 0
    assert divergence(Bigram(logits), Bigram(table(0)), windows).kl_mean == math.inf


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary must be the model's, 11 tokens, not 12"):
        divergence(Bigram(table(0)), Bigram(table(0, 12)), tokens(1, 2, 5))


# Overlap


def shingles(documents):
    found = []
    for document in documents:
        text = " ".join(document.split())
        length = min(50, len(text))
        found += [text[i : i + length] for i in range(len(text) - length + 1) if length]
    return found


documents = st.lists(
    st.text("ab\n \u00e9\U0001f600", max_size=70)
    | st.sampled_from(["ab" * 40, "a" * 52, "aé" * 30]),
    max_size=4,
)


@settings(deadline=None)
@given(documents, documents)
def test_overlap_counts_common_runs_of_fifty_characters(calibration, evaluation):
    seen, wanted = set(shingles(calibration)), shingles(evaluation)
    expected = sum(each in seen for each in wanted) / len(wanted) if wanted else 0.0
    assert overlap(calibration, evaluation) == expected


def test_a_large_overlap_is_warned_of(caplog):
    warn_of_overlap(0.01)
    assert not caplog.records
    warn_of_overlap(0.25)
    assert "25.0 % of the evaluation text also stands in the calibration text" in caplog.text


# Records


@pytest.fixture
def story(tmp_path):
    file = tmp_path / "story.txt"
    file.write_text("def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 6)
    return file


def test_a_record_says_what_was_measured_on_what_with_what(story, caplog):
    record = evaluate(
        EMBEDDED,
        story,
        seqlen=32,
        limit=2,
        reference=EMBEDDED,
        calibration_documents=[story.read_text()],
    )
    assert json.loads(json.dumps(record)) == record
    assert (record["windows"], record["seqlen"], record["tokens"]) == (2, 32, 62)
    assert record["perplexity"] == record["reference_perplexity"]
    assert (record["kl_mean"], record["top1_agreement"]) == (0, 1)
    assert record["model_digest"] == record["reference_digest"] == model_digest(EMBEDDED)
    assert {"bitmosaic", "torch", "transformers", "python", "platform"} <= set(record["versions"])
    assert record["calibration_overlap"] == 1
    assert "calibrated on" in caplog.text


def test_a_record_by_document_takes_each_from_bos(story):
    record = evaluate(EMBEDDED, story, seqlen=16, by_document=True)
    assert (record["protocol"], record["tokens"], record["windows"]) == ("documents", 15, 1)
    assert record["text"] == str(story)
    assert "calibration_overlap" not in record


def test_the_digest_is_of_configuration_and_tensors(tmp_path):
    config, weights = (EMBEDDED / "config.json").read_bytes(), b"12345678"
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = model_digest(tmp_path)
    (tmp_path / "README.md").write_text("not part of it")
    assert model_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345679")
    assert model_digest(tmp_path) != before


def test_a_checkpoint_without_some_weight_is_refused(tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((EMBEDDED / name).read_bytes())
    tensors = load_file(EMBEDDED / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not lack 1 of them \(model\.layers\.2\.mlp\.up_proj"):
        load_model(tmp_path)


def test_a_missing_model_is_refused(tmp_path, story):
    with pytest.raises(FileNotFoundError, match="model directory must exist"):
        evaluate(tmp_path / "absent", story, seqlen=8)
