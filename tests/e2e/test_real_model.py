"""The embedded model, trained on real text: the promises about quality, in seconds.

Figures were measured with CPython 3.11.7 on the first 8 held-out windows of 256 tokens, calibrated
on 8 windows of training text: original 22.3, see each test.  Another Python has other modules, so
limits leave room; where two models are compared, both see the same text.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from bitmosaic import pipeline
from bitmosaic.allocation import Budget
from bitmosaic.evaluation import divergence, stdlib_windows
from bitmosaic.evaluation.divergence import DivergenceResult
from bitmosaic.methods import Method
from bitmosaic.methods.layerwise import Layerwise
from bitmosaic.methods.rtn import Rtn
from bitmosaic.methods.sfmp import Sfmp
from bitmosaic.model.source import Source
from runs import load

MODEL = Path(str(files("bitmosaic") / "data" / "stdlib-llama"))


class Bench:
    """Quantizes the embedded model and measures it against the original."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = Source(MODEL)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        training = stdlib_windows(tokenizer, "train", 256, limit=8)
        self.heldout = stdlib_windows(tokenizer, "heldout", 256, limit=8)
        self.statistics = pipeline.calibrate(self.source, training, directory / "statistics")
        self.training = training
        self.original: PreTrainedModel = load(MODEL)
        self.measured: dict[tuple[Method, float], DivergenceResult] = {}

    def measure(self, method: Method, bits: float) -> DivergenceResult:
        key = (method, bits)
        if key not in self.measured:
            output = self.directory / f"out-{len(self.measured)}"
            pipeline.quantize(
                self.source,
                method,
                Budget(bits=bits),
                output,
                tokens=self.training if method.block_statistics else None,
                statistics_directory=self.statistics.directory if method.statistics else None,
            )
            self.measured[key] = divergence(load(output), self.original, self.heldout)
            r = self.measured[key]
            print(
                method.name,
                bits,
                r.kl_mean,
                r.model.perplexity,
                r.reference.perplexity,
                r.top1_agreement,
            )
        return self.measured[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def test_all(bench):
    for b in (2.5, 2.75, 3.0):
        bench.measure(Sfmp(), b)
        bench.measure(Layerwise(), b)
        bench.measure(Sfmp(base="gptq"), b)
        bench.measure(Layerwise(base="gptq"), b)
    for b in (3.0, 3.16, 3.2, 3.5):
        bench.measure(Rtn(), b)
    from bitmosaic.methods.gptq import Gptq

    bench.measure(Gptq(), 3.2)
