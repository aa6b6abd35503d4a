import math
import os

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import architectures
from architectures import HIDDEN, VOCABULARY
from bitmosaic.formats.base import UnsupportedError
from bitmosaic.model import loss as loss_module
from bitmosaic.model.experts import linears
from bitmosaic.model.source import Source
from bitmosaic.model.sweep import Sweep
from bitmosaic.statistics import get

SAMPLES, TOKENS = 3, 11
SINGLE, DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """One saved random model of each architecture, made when first asked for."""
    made = {}

    def directory(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            architectures.tiny(kind, num_hidden_layers=3).save_pretrained(made[kind])
        return made[kind]

    return directory


@pytest.fixture
def tokens():
    return architectures.tokens(SAMPLES, TOKENS)


def cross_entropy(logits, window):
    return functional.cross_entropy(logits[0, :-1], window[1:])


def plain_gradients(directory, tokens, dtype):
    """Return {(block, linear): [gradient of each sample]} and the losses by plain backward."""
    # other implementations of experts know no float64; constants stay those of float32
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
    model = model.to(dtype).eval()
    source = Source(directory)
    gradients, losses = {}, []
    for window in tokens:
        model.zero_grad()
        loss = cross_entropy(model(input_ids=window[None], use_cache=False).logits, window)
        loss.backward()
        losses.append(float(loss.detach()))
        for index, path in enumerate(source.block_names):
            block = model.get_submodule(path)
            for name in linears(source.load_block(index)):
                gradients.setdefault((index, name), []).append(weight_gradient(block, name))
    return gradients, torch.tensor(losses, dtype=torch.float64)


def weight_gradient(block, name):
    """Look a normalised matrix's gradient up in the model as transformers builds it."""
    if ".experts." in name:
        path, expert, leaf = name.rsplit(".", 2)
        return getattr(block.get_submodule(path), leaf).grad[int(expert)].clone()
    module = block.get_submodule(name)
    gradient = module.weight.grad
    return gradient.clone() if isinstance(module, torch.nn.Linear) else gradient.T.clone()


def swept(model, tokens, on_gradient, *, dtype=torch.float32, **options):
    """Run a whole sweep; return the losses."""
    source = Source(model)
    with Sweep(source, tokens, dtype=dtype, **options) as sweep:
        sweep.embed()
        for index in range(sweep.block_count):
            sweep.forward(index, source.load_block(index, dtype))
        losses = sweep.loss_gradients()
        for index in reversed(range(sweep.block_count)):
            block = source.load_block(index, dtype)
            sweep.backward(
                index, block, lambda name, sample, g, i=index: on_gradient((i, name), sample, g)
            )
        return losses


def swept_gradients(model, tokens, **options):
    gradients = {}

    def collect(key, sample, gradient):
        gradients.setdefault(key, {})[sample] = gradient

    losses = swept(model, tokens, collect, **options)
    return gradients, losses


def swept_fisher(model, tokens, **options):
    statistics = {}

    def collect(key, _, gradient):
        statistics.setdefault(key, get("fisher")(gradient.shape)).update(gradient)

    swept(model, tokens, collect, **options)
    return statistics


@pytest.mark.parametrize("kind", architectures.NAMES)
def test_gradients_equal_plain_backward(kind, directories, tokens):
    directory = directories(kind)
    wide, losses = plain_gradients(directory, tokens, torch.float64)
    narrow, narrow_losses = plain_gradients(directory, tokens, torch.float32)
    found, found_losses = swept_gradients(directory, tokens, dtype=torch.float64)
    assert set(found) <= set(wide)
    for key, expected in wide.items():
        for sample, gradient in enumerate(expected):
            result = found.get(key, {}).get(sample)
            if result is None:  # an expert that no token of the sample was routed to
                assert ".experts." in key[1]
                assert gradient.abs().max() == 0
                continue
            # Rounding errors of one and the same graph scale with the unit round-off, so the
            # float32 error of plain backward, scaled to float64, is what two float64 results may
            # differ by: each has one such error, and 4 leaves room for another order of sums.
            error = (narrow[key][sample].double() - gradient).abs().max()
            bound = 2 * 4 * error * DOUBLE / SINGLE
            assert (result - gradient).abs().max() <= bound
    loss_error = (narrow_losses - losses).abs().max() + SINGLE * losses.max()
    assert (found_losses - losses).abs().max() <= 8 * loss_error * DOUBLE / SINGLE


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt2"])
def test_fisher_equals_plain_backward_to_float32_rounding(kind, directories, tokens):
    directory = directories(kind)
    wide, _ = plain_gradients(directory, tokens, torch.float64)
    narrow, _ = plain_gradients(directory, tokens, torch.float32)
    streamed = swept_fisher(directory, tokens)
    exact = swept_fisher(directory, tokens, dtype=torch.float64)
    for key, gradients in wide.items():
        fisher = sum(gradient.square() for gradient in gradients)
        plain = sum(gradient.square() for gradient in narrow[key])
        if key not in streamed:
            assert fisher.max() == 0
            continue
        # float32: as far from the truth as plain float32 backward is, give or take the order of
        # sums
        error = (plain.double() - fisher).abs().max() + SINGLE * fisher.max()
        assert (streamed[key].value().double() - fisher).abs().max() <= 4 * error
        # float64: only the accumulator's digits and its rounding to float32 remain visible
        digits = SAMPLES * 2.0**-40 * fisher.amax(dim=1, keepdim=True)
        bound = digits + SINGLE / 2 * fisher + 8 * error * DOUBLE / SINGLE
        assert ((exact[key].value().double() - fisher).abs() <= bound).all()


def test_hidden_states_are_those_of_the_model(directories, tokens):
    source = Source(directories("llama"))
    model = AutoModelForCausalLM.from_pretrained(source.path).eval()
    sweep = Sweep(source, tokens)
    sweep.embed()
    for index in range(3):
        sweep.forward(index, source.load_block(index))
    with torch.no_grad():
        for sample, window in enumerate(tokens):
            states = model(input_ids=window[None], output_hidden_states=True).hidden_states
            for index in range(3):  # the last entry is after the final norm
                assert torch.equal(sweep.inputs(index)[sample], states[index])
            assert torch.equal(model.model.norm(sweep.inputs(3)[sample]), states[3])


def results_of(model, tokens, **options):
    gradients, losses = swept_gradients(model, tokens, **options)
    return [
        losses,
        *(gradients[key][sample] for key in sorted(gradients) for sample in gradients[key]),
    ]


@pytest.mark.parametrize("cap", [0, 1, 2])
def test_files_and_memory_give_the_same_bits(cap, directories, tokens, tmp_path):
    each = SAMPLES * TOKENS * HIDDEN * 4
    expected = results_of(directories("llama"), tokens)
    found = results_of(directories("llama"), tokens, memory_cap=cap * each, directory=tmp_path)
    assert len(expected) == len(found) > 1
    assert all(map(torch.equal, expected, found))
    assert list(tmp_path.iterdir()) == []


def test_memory_cap_is_kept(directories, tokens, tmp_path):
    each = SAMPLES * TOKENS * HIDDEN * 4
    source = Source(directories("llama"))
    sweep = Sweep(source, tokens, memory_cap=2 * each, directory=tmp_path)
    sweep.embed()
    for index in range(3):
        sweep.forward(index, source.load_block(index))
    held = [sweep.inputs(index).bytes_in_memory for index in range(4)]
    assert held == [each, each, 0, 0]
    sweep.forward(2, source.load_block(2), keep_inputs=False)
    with pytest.raises(ValueError, match="inputs of block 2 must be kept"):
        sweep.inputs(2)


def test_half_precision_states_survive_files(directories, tokens, tmp_path):
    expected = results_of(directories("llama"), tokens, dtype=torch.bfloat16)
    found = results_of(
        directories("llama"), tokens, dtype=torch.bfloat16, memory_cap=0, directory=tmp_path
    )
    assert all(map(torch.equal, expected, found))
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in found)


@pytest.mark.parametrize("cap", [None, 0])
@pytest.mark.parametrize("stop", [3, 2, 1])
def test_backward_resumes_at_any_block(stop, cap, directories, tokens, tmp_path):
    directory, source = directories("llama"), Source(directories("llama"))
    expected, _ = swept_gradients(directory, tokens)
    found = {}

    def collect(index):
        return lambda name, sample, g: found.setdefault((index, name), {}).update({sample: g})

    first = Sweep(source, tokens, memory_cap=cap, directory=tmp_path)
    first.embed()
    for index in range(3):
        first.forward(index, source.load_block(index))
    first.loss_gradients()
    for index in reversed(range(stop, 3)):
        first.backward(index, source.load_block(index), collect(index))
    saved = {name: tensor.clone() for name, tensor in first.gradients.items()}
    assert saved["index"].tolist() == [stop]
    inputs = first.inputs(1).stacked().clone() if stop > 1 else None
    first.close()

    second = Sweep(source, tokens, memory_cap=cap, directory=tmp_path)
    second.embed()
    if inputs is not None:  # the forward sweep resumes from saved inputs too
        second.restore_inputs(1, inputs)
    for index in range(1, stop):
        second.forward(index, source.load_block(index))
    second.gradients = saved
    for index in reversed(range(stop)):
        second.backward(index, source.load_block(index), collect(index))
    assert found.keys() == expected.keys()
    for key, gradients in expected.items():
        assert all(torch.equal(found[key][sample], g) for sample, g in gradients.items())


def test_breaking_off_a_block_leaves_the_state_before_it(directories, tokens):
    source = Source(directories("llama"))
    sweep = Sweep(source, tokens)
    sweep.embed()
    for index in range(3):
        sweep.forward(index, source.load_block(index))
    sweep.loss_gradients()
    before = {name: tensor.clone() for name, tensor in sweep.gradients.items()}
    block = source.load_block(2)

    def break_off(_, sample, __):
        if sample == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.backward(2, block, break_off)
    assert all(torch.equal(before[name], tensor) for name, tensor in sweep.gradients.items())
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in block.parameters())
    sweep.backward(2, block, lambda *_: None)


def test_observers_see_each_sample(directories, tokens):
    source = Source(directories("qwen3_moe"))
    sweep = Sweep(source, tokens)
    sweep.embed()
    block = source.load_block(0)
    names, seen = list(linears(block)), {}

    def observer(name):
        return lambda sample, x: seen.setdefault(name, {}).update({sample: x})

    sweep.forward(0, block, observe={name: observer(name) for name in names})
    with torch.no_grad():
        normed = block.input_layernorm(sweep.inputs(0)[1])[0]
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert sorted(seen[name]) == [0, 1, 2]
        assert torch.equal(seen[name][1], normed)
    for sample in range(SAMPLES):  # two experts a token
        routed = [seen.get(f"mlp.experts.{expert}.down_proj", {}) for expert in range(6)]
        assert sum(len(x[sample]) for x in routed if sample in x) == 2 * TOKENS
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_loss_in_chunks_is_the_loss(directories, tokens, monkeypatch):
    directory = directories("gemma2")
    whole, losses = swept_gradients(directory, tokens, dtype=torch.float64)
    narrow, _ = swept_gradients(directory, tokens)
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * VOCABULARY * 8)  # four tokens a chunk
    chunked, chunked_losses = swept_gradients(directory, tokens, dtype=torch.float64)
    assert torch.allclose(losses, chunked_losses, rtol=DOUBLE * TOKENS * VOCABULARY, atol=0)
    for key, gradients in whole.items():
        for sample, gradient in gradients.items():
            error = (narrow[key][sample].double() - gradient).abs().max()
            difference = (chunked[key][sample] - gradient).abs().max()
            assert difference <= 8 * error * DOUBLE / SINGLE


def test_blocks_are_not_changed_and_kept_inputs_neither(directories, tokens):
    source = Source(directories("llama"))
    sweep = Sweep(source, tokens)
    sweep.embed()
    sweep.inputs(0)[0].zero_()
    assert sweep.inputs(0)[0].abs().max() > 0
    before = sweep.inputs(0).stacked().clone()
    block = source.load_block(0)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    sweep.forward(0, block)
    assert torch.equal(sweep.inputs(0).stacked(), before)
    assert all(torch.equal(state[name], tensor) for name, tensor in block.state_dict().items())
    assert len(sweep.inputs(0)[:2]) == 2
    assert torch.equal(sweep.inputs(0)[-1], sweep.inputs(0)[SAMPLES - 1])
    with pytest.raises(IndexError):
        sweep.inputs(0)[SAMPLES]


def test_full_disk_is_one_clear_sentence(directories, tokens, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    sweep = Sweep(Source(directories("llama")), tokens, memory_cap=0, directory=tmp_path)
    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match=f"{SAMPLES * TOKENS * HIDDEN * 4} bytes of block inputs"):
        sweep.embed()
    assert list(tmp_path.iterdir()) == []


def test_order_of_stages_is_checked(directories, tokens):
    source = Source(directories("llama"))
    sweep = Sweep(source, tokens)
    block = source.load_block(2)
    with pytest.raises(ValueError, match="Run embed"):
        sweep.forward(0, block)
    with pytest.raises(ValueError, match="Run embed"):
        sweep.restore_inputs(0, torch.zeros(1))
    with pytest.raises(ValueError, match="Run loss_gradients first"):
        _ = sweep.gradients
    sweep.embed()
    for index in range(3):
        sweep.forward(index, source.load_block(index))
    sweep.loss_gradients()
    with pytest.raises(ValueError, match="block 1 cannot follow on gradients at block 3"):
        sweep.backward(1, block, lambda *_: None)
    with pytest.raises(ValueError, match="of another run"):
        sweep.restore_inputs(1, torch.zeros(SAMPLES, TOKENS, HIDDEN + 1))
    with pytest.raises(ValueError, match="of another run"):
        sweep.gradients = {"index": torch.tensor([1]), "states": torch.zeros(1, 2, 3)}
    with pytest.raises(ValueError, match="of another model"):
        sweep.gradients = sweep.gradients | {"index": torch.tensor([4])}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), "must be int64 of shape"),
        (torch.zeros(2, 4, dtype=torch.int32), "must be int64 of shape"),
        (torch.zeros(0, 4, dtype=torch.int64), "must be int64 of shape"),
        (torch.zeros(2, 1, dtype=torch.int64), "at least 2 tokens"),
        (torch.full((2, 4), VOCABULARY), f"within 0 and {VOCABULARY - 1}"),
        (torch.full((2, 4), -1), f"within 0 and {VOCABULARY - 1}"),
    ],
)
def test_bad_tokens_are_refused(bad, message, directories):
    with pytest.raises(ValueError, match=message):
        Sweep(Source(directories("llama")), bad).embed()


def test_negative_cap_is_refused(directories, tokens):
    with pytest.raises(ValueError, match="memory_cap must be"):
        Sweep(Source(directories("llama")), tokens, memory_cap=-1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (lambda ids: {"shared": {}}, "not dict"),
        (lambda ids: {"tokens": ids.clone()}, "sample 1 differs from sample 0"),
    ],
)
def test_state_between_blocks_is_refused(keywords, message, directories, tokens, monkeypatch):
    source = Source(directories("llama"))
    load_rest = source.load_rest

    def tampered(dtype, **parts):
        rest = load_rest(dtype, **parts)
        forward = rest.model.forward
        rest.model.forward = lambda input_ids, **options: forward(
            input_ids=input_ids, **options, **keywords(input_ids)
        )
        return rest

    monkeypatch.setattr(source, "load_rest", tampered)
    with pytest.raises(UnsupportedError, match=message):
        Sweep(source, tokens).embed()


def test_loss_is_the_mean_over_predictions(directories):
    window = torch.tensor([[5, 7]])  # one prediction
    source = Source(directories("llama"))
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = -model(input_ids=window).logits[0, 0].log_softmax(dim=0)[7]
    losses = swept(source.path, window, lambda *_: None, dtype=torch.float64)
    assert math.isclose(losses.item(), expected.item(), rel_tol=DOUBLE * VOCABULARY)


def test_subset_is_a_sweep_of_these_samples(directories, tokens):
    source = Source(directories("llama"))
    chosen = [2, 0]
    with Sweep(source, tokens) as whole, Sweep(source, tokens[chosen]) as alone:
        whole.embed()
        alone.embed()
        part = whole.subset(chosen)
        for index in range(part.block_count):
            block = source.load_block(index)
            part.forward(index, block)
            alone.forward(index, block)
        assert torch.equal(part.loss_gradients(), alone.loss_gradients())
        assert torch.equal(part.gradients["states"], alone.gradients["states"])
        part.close()


def test_teacher_makes_the_loss_a_divergence(directories, tokens):
    source = Source(directories("llama"))
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64).eval()
    with Sweep(source, tokens, dtype=torch.float64) as sweep:
        sweep.embed()
        for index in range(sweep.block_count):
            sweep.forward(index, source.load_block(index, torch.float64))
        own = sweep.inputs(sweep.block_count).stacked().clone()
        other = own.roll(1, 0)  # what another model might give
        losses = sweep.loss_gradients(lambda sample: other[sample][None])
        state = sweep.gradients["states"]
    head = torch.nn.Sequential(model.model.norm, model.lm_head)
    for sample in range(SAMPLES):
        hidden = own[sample].clone().requires_grad_()
        wanted, found = (head(each)[:-1].log_softmax(-1) for each in (other[sample], hidden))
        expected = (wanted.exp() * (wanted - found)).sum(-1).mean()
        (gradient,) = torch.autograd.grad(expected, hidden)
        # sums of a vocabulary's terms, differently ordered, of numbers near 1
        bound = 16 * VOCABULARY * DOUBLE
        assert math.isclose(losses[sample].item(), expected.item(), rel_tol=bound, abs_tol=bound)
        assert (state[sample] - gradient).abs().max() <= bound * max(1, gradient.abs().max())
