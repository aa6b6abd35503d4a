"""Quantizing on another device than the CPU: nothing is mixed up, and the bytes are the same.

The device is `pretended`, whose numbers are the CPU's; on a GPU they differ in their last bits.
OPT, since its gradients are made of the same operations on any device.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import bitmosaic
from bitmosaic import devices, methods, pipeline, rounding
from bitmosaic.allocation import Budget
from bitmosaic.allocation.thresholds import Histogram
from bitmosaic.evaluation.generation import generate
from bitmosaic.evaluation.model import open_tokenizer
from bitmosaic.evaluation.record import evaluate, load_model
from bitmosaic.kmeans import lloyd, optimal
from bitmosaic.methods import Method
from bitmosaic.methods.toga import Toga
from bitmosaic.model.source import Source
from bitmosaic.pipeline import QuantizeOptions, preflight
from bitmosaic.pipeline.machine import Rates
from bitmosaic.pipeline.masked_matrix import Matrix
from bitmosaic.pipeline.preflight import Need, admit
from bitmosaic.rounding.scales import search_scales
from bitmosaic.statistics.base import ReproducibleSum
from commands import make_kit
from packed import reference_only  # noqa: F401  (a fixture)
from pretended import DEVICE, Away, pretended
from runs import Case, case, content

LADDER = ("pruned", "int1-g32-sym", "int2-g32", "int4-g32")
LEARNED = {"search": "learned", "steps": 4, "batch": 2, "tile_in": 32, "tile_out": 32}
METHODS: dict[str, tuple[str, dict[str, Any], Budget]] = {
    "sfmp": ("sfmp", {"base": "awq"}, Budget(bits=3.0)),
    "layerwise": ("layerwise", {"base": "gptq"}, Budget(bits=3.5)),
    "cmpq": ("cmpq", {"formats": ("codebook2", "codebook4")}, Budget(bits=5.0)),
    "septq": ("septq", {}, Budget(bits=3.5)),
    "fgmp": ("fgmp", {}, Budget(fp4=0.5)),
    "toga": (
        "toga",
        {"formats": LADDER, "base": "gptq", "widths": True, **LEARNED},
        Budget(bits=1.5),
    ),
    "toga in bands": (
        "toga",
        {
            "formats": ("int4-g32-sym", "int8-g32-sym"),
            "mode": "weight+activation",
            **LEARNED,
            "tile_out": None,
        },
        Budget(bits=6.5),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def same_attention() -> Iterator[None]:
    """The CPU has an attention kernel of its own, which rounds otherwise."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("opt"), "opt", torch.float32)


@pytest.fixture(scope="module")
def away(opt: Case) -> Source:
    return Source(opt.directory / "model", DEVICE)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One block: each operation on the device costs Python."""
    return case(tmp_path_factory.mktemp("short"), "opt", torch.float32, num_hidden_layers=1)


def tensors(directory: Path) -> dict[str, bytes]:
    """Read the tensor files; the rest tells on which device they were made, as do directories."""
    found = content(directory).items()
    return {Path(name).name: data for name, data in found if name.endswith(".safetensors")}


def test_statistics(opt: Case, away: Source) -> None:
    with pretended():
        measured = pipeline.calibrate(away, opt.tokens, opt.directory / "measured away")
    assert tensors(measured.directory) == tensors(opt.statistics.directory)
    assert measured.manifest["device"] == DEVICE.type
    assert opt.statistics.manifest["device"] == "cpu"


@pytest.mark.parametrize("name", METHODS)
def test_scores_searches_and_outputs(short: Case, name: str, tmp_path: Path) -> None:
    kind, fields, budget = METHODS[name]
    method = methods.get(kind)(**fields)
    needs = method.block_statistics or method.learning is not None
    away = Source(short.directory / "model", DEVICE)
    found = []
    for source in (short.source, away):
        kept = shutil.copytree(short.statistics.directory, tmp_path / f"of {source.device}")
        output = tmp_path / f"on {source.device}"
        with pretended():
            facts = pipeline.quantize(
                source,
                method,
                budget,
                output,
                tokens=short.tokens if needs else None,
                statistics_directory=kept,
            )
        found.append((tensors(output), tensors(kept)))
        if name == "toga":  # narrower matrices come to the device too
            assert facts["bits_per_kept_weight"] > facts["bits_per_weight"]
    assert found[0] == found[1]


def test_the_work_is_done_there(
    short: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes say nothing of a device that was never used."""
    seen: dict[str, set[torch.device]] = {}

    def watched(owner: Any, name: str, tensor: Callable[..., torch.Tensor]) -> None:
        whole = getattr(owner, name)

        def spied(*arguments: Any, **keywords: Any) -> Any:
            seen.setdefault(name, set()).add(tensor(*arguments).device)
            return whole(*arguments, **keywords)

        monkeypatch.setattr(owner, name, spied)

    watched(ReproducibleSum, "add", lambda total, _: total.state()["high"])
    watched(Toga, "score", lambda _, view: next(iter(view.weights.values())))
    watched(Matrix, "masked", lambda matrix, _: matrix.left[0])
    watched(rounding, "compensated", lambda weight, *_: weight)
    watched(Toga, "quantize", lambda _, name, weight, *rest: weight)
    _, fields, budget = METHODS["toga"]
    with pretended():
        source = Source(short.directory / "model", DEVICE)
        pipeline.quantize(source, Toga(**fields), budget, tmp_path / "out", tokens=short.tokens)
    names = ("add", "score", "masked", "compensated", "quantize")
    assert seen == {name: {DEVICE} for name in names}


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3_moe"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Experts, and what a block is called with, also come to the device."""
    made = case(tmp_path, architecture, torch.float32)
    method = methods.get("gptq")(format="int4-g32")
    plain, _ = made.quantize(method, Budget(bits=6.5), "plain", tokens=made.tokens)
    with pretended():
        source = Source(tmp_path / "model", DEVICE)
        pipeline.quantize(source, method, Budget(bits=6.5), tmp_path / "away", tokens=made.tokens)
    assert tensors(plain) == tensors(tmp_path / "away")


def test_an_interrupted_run_goes_on(opt: Case, away: Source, tmp_path: Path) -> None:
    """What was packed before is run again on the device; inputs of blocks lie in files."""
    method = methods.get("gptq")(format="int4-g32")
    options = QuantizeOptions(memory_cap=0)
    plain, _ = opt.quantize(method, Budget(bits=6.5), "gptq", tokens=opt.tokens)

    def once(items: Iterable[Any], description: str, _: int) -> Iterator[Any]:
        for place, item in enumerate(items):
            if description == "quantize" and place == 1:
                raise KeyboardInterrupt
            yield item

    arguments = (away, method, Budget(bits=6.5), tmp_path / "out")
    with pretended():
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(*arguments, tokens=opt.tokens, options=options, track=once)
        pipeline.quantize(*arguments, tokens=opt.tokens, options=options)
    assert tensors(tmp_path / "out") == tensors(plain)


def test_a_run_begun_elsewhere_is_refused(opt: Case, away: Source, tmp_path: Path) -> None:
    method: Method = methods.get("rtn")(format="int4-g32")

    def stop(*_: Any) -> Iterator[Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(opt.source, method, Budget(bits=6.5), tmp_path / "out", track=stop)
    with pretended(), pytest.raises(FileExistsError, match="it differs in device"):
        pipeline.quantize(away, method, Budget(bits=6.5), tmp_path / "out")


def test_recipes_name_the_device(opt: Case) -> None:
    method = methods.get("rtn")(format="int4-g32")
    _, facts = opt.quantize(method, Budget(bits=6.5), "named")
    assert facts["versions"]["device"] == "cpu"


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("kv", ["exact", "int4"])
def test_evaluation_and_generation(kv: str, tmp_path: Path) -> None:
    """Packed weights, windows, caches and the original come to the device: equal figures."""
    kit = make_kit(tmp_path)
    packed = tmp_path / "packed"
    bitmosaic.quantize(kit / "model", packed, bits=4.8, method="rtn", format="int4-g32")
    tokenizer = open_tokenizer(packed)
    found = []
    for device in (devices.CPU, DEVICE):
        with pretended():
            figures = evaluate(
                packed,
                kit / "heldout.txt",
                seqlen=32,
                limit=4,
                reference=kit / "model",
                kv=kv,
                device=device,
            )
            model = load_model(packed, activations="exact", dtype=torch.float32, device=device)
            text = generate(model, tokenizer, "def f", tokens=8).text
        assert {each.device for each in model.parameters()} <= {device}
        found.append(({**figures, "seconds": 0}, text))
    assert found[0] == found[1]


@pytest.mark.parametrize("weighted", [False, True])
def test_centres_are_as_good(weighted: bool) -> None:
    """Sums in another order may cut at another of two places that are as good to rounding."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 700, generator=generator)
    weights = torch.rand(5, 700, generator=generator) if weighted else None
    for fit in (optimal, lloyd):
        here = fit(values, 8, weights)
        with pretended():
            there = None if weights is None else weights.to(DEVICE)
            with devices.on(DEVICE):
                found = fit(values.to(DEVICE), 8, there).cpu()
        losses = [loss(values, weights, centres) for centres in (here, found)]
        # Each is a sum of 700 squares below 16, whose terms are wrong by float32 centres' rounding.
        bound = 700 * 16 * torch.finfo(torch.float32).eps
        assert float((losses[1] - losses[0]).abs().max()) <= bound


def loss(values: torch.Tensor, weights: torch.Tensor | None, centres: torch.Tensor) -> torch.Tensor:
    """The squared error of each row at its nearest centres."""
    square = (values[:, :, None] - centres[:, None]).double().square().amin(2)
    return (square if weights is None else square * weights).sum(1)


def test_scales_are_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(300, 16, generator=generator)
    importance = torch.rand(300, 16, generator=generator)
    here = search_scales(weight, importance)
    with pretended():
        found = devices.moved(search_scales(weight.to(DEVICE), importance.to(DEVICE)), devices.CPU)
    for one, other in zip(here, found, strict=True):
        assert torch.equal(one, other)


def test_a_device_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda _: 2**30)
    need = Need("calibrate", {"backward": {"a block": 3 * 2**30}}, remedy="use fewer")
    expected = "device cpu must have 3.0GiB free for calibrate .backward., not 1.0GiB. Leave"
    with pytest.raises(ValueError, match=expected):
        admit(need, preflight.FREE)


def test_rates_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmosaic.pipeline.machine._GPU_SIDE", 256)
    with pretended():
        rates = Rates.measure(DEVICE)
    assert min(rates.products, rates.sums, rates.roundings) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device must be cpu or cuda, not 'tpu'"),
        ("meta", "device must be cpu or cuda, not 'meta'"),
        ("cuda", "device 'cuda' must be one that torch sees"),
    ],
)
def test_devices_that_are_none(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    calls = (
        lambda: bitmosaic.calibrate(tmp_path, tmp_path / "x", calibration="t", device=name),
        lambda: bitmosaic.allocate(tmp_path, bits=4, device=name),
        lambda: bitmosaic.quantize(tmp_path, tmp_path / "x", bits=4, device=name),
        lambda: bitmosaic.evaluate(tmp_path, "text", device=name),
        lambda: bitmosaic.generate(tmp_path, "text", device=name),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_index_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.find("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="'cuda:2' must be within cuda:0 and cuda:1"):
        devices.find("cuda:2")


def test_sums_of_a_gpu_have_one_order_for_a_while() -> None:
    torch.use_deterministic_algorithms(False)
    with devices.repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with devices.repeatable(devices.CPU):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_torch_keeps_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"mem_get_info": (10, 50), "memory_reserved": 7, "memory_allocated": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, size=size: size)
    assert devices.free_bytes(torch.device("cuda")) == 13
    assert devices.free_bytes(devices.CPU) is None


def test_moving_keeps_what_is_one_object() -> None:
    """FGMP pools the scores of an input once, however many matrices read it."""
    scores = Histogram(torch.tensor([1, 2]), torch.tensor([3, 4]))
    shared = {"q": scores, "k": scores, "rest": [(1, scores.bins), None, "name"]}
    assert devices.moved(shared, devices.CPU) is shared
    with pretended():
        there = devices.moved(shared, DEVICE)
        assert there["q"] is there["k"]
        assert there["rest"][0][1] is there["q"].bins
        assert isinstance(there["q"].counts, Away)
        assert there["rest"][1:] == [None, "name"]
        back = devices.moved(there, devices.CPU)
    assert torch.equal(back["q"].counts, scores.counts)
    assert back["q"] is back["k"]


def test_what_the_device_refuses() -> None:
    """The tests above mean something only if mixing fails."""
    with pretended():
        there = torch.ones(3).to(DEVICE)
        with pytest.raises(RuntimeError, match="two devices"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="order is not fixed"):
            (there / 3).cumsum(0)
        with pytest.raises(RuntimeError):
            there.numpy()
        with pytest.raises(RuntimeError):
            there.data_ptr()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
