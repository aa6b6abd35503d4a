"""One evaluation, from paths to a JSON-clean record of what was measured, on what, with what."""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bitmosaic import __version__
from bitmosaic.backends import check_activations
from bitmosaic.checkpoint import tensor_files
from bitmosaic.evaluation.divergence import DivergenceResult, divergence
from bitmosaic.evaluation.needs import evaluate_need
from bitmosaic.evaluation.overlap import (
    TOLERATED,
    overlap,
    sketched_overlap,
    warn_of_overlap,
)
from bitmosaic.evaluation.packed_cache import WithPackedCache, check_kv
from bitmosaic.evaluation.perplexity import Progress, perplexity
from bitmosaic.evaluation.shares import observed_shares
from bitmosaic.evaluation.text import (
    Tokenizer,
    document_sequences,
    read_text,
    text_digest,
    token_windows,
)
from bitmosaic.linear import PackedModule, set_activations
from bitmosaic.model.skeleton import resolve
from bitmosaic.pipeline.preflight import FREE, Limits, admit

__all__ = [
    "EvaluationText",
    "activations_cost",
    "divergence_figures",
    "evaluate",
    "load_model",
    "model_digest",
    "open_text",
    "versions",
]

logger = logging.getLogger(__name__)

CHUNK = 2**20


@dataclass(frozen=True)
class EvaluationText:
    """A text cut for one tokenizer: where it came from, its documents, and its windows."""

    name: str
    documents: list[str]
    windows: Tensor | list[Tensor]


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    seqlen: int,
    split: str = "test",
    limit: int | None = None,
    by_document: bool = False,
    reference: str | Path | None = None,
    calibration_documents: Sequence[str] = (),
    activations: str = "exact",
    kv: str = "exact",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    limits: Limits = FREE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on a text and return the record.

    Figures describe the checkpoint itself where activations are exact. With "int8" they include
    what a backend loses by rounding activations, and the record holds that cost by itself as well:
    `exact_perplexity`, and divergence of int8 from exact activations (`int8_kl_mean` and so on).

    Args:
        model: Checkpoint directory or hub id, quantized or not.
        text: Any source that `read_text` takes.
        seqlen: Tokens of a window.
        split: Split of a text source that has several.
        limit: Windows (documents where `by_document`) to keep.
        by_document: Score each document by itself, BOS before it, up to `seqlen` tokens.
        reference: The original; adds KL divergence, agreement and its own perplexity.
        calibration_documents: What the model was calibrated on; adds the share of the evaluated
            text that it contains, with a warning above one hundredth.
        activations: "exact", or "int8" for what a packed model computes with by default.
        kv: "exact", or "int4" for keys and values of the model, not of the reference, in 4 bits;
            adds the bytes that a token takes in the cache.
        dtype: Type in which both models compute.
        device: Where both models run.
        batch: Windows run at once.
        limits: The most memory to take, and whom to tell what is needed.
        progress: Called with (windows done, windows in all).
    """
    check_activations(activations)
    check_kv(kv)
    path = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    chosen = open_text(
        tokenizer, text, seqlen=seqlen, split=split, limit=limit, by_document=by_document
    )
    paths = [path] if reference is None else [path, resolve(reference)]
    admit(evaluate_need(paths, chosen.windows, dtype), limits)
    loaded = load_model(path, activations=activations, dtype=dtype, device=device)
    ours = loaded if kv == "exact" else WithPackedCache(loaded)
    record: dict[str, Any] = {
        "model": str(model),
        "model_digest": model_digest(path),
        "text": chosen.name,
        "text_digest": text_digest(chosen.documents),
        "protocol": "documents" if by_document else "windows",
        "dtype": str(dtype).removeprefix("torch."),
        "activations": activations,
        "kv": kv,
        "versions": versions(),
    }
    used = [tokenizer.decode(window, skip_special_tokens=True) for window in _runs(chosen)]
    record |= _overlap_with_calibration(path, record["text_digest"], used, calibration_documents)
    began = time.monotonic()
    with observed_shares(ours) as shares:
        if reference is None:
            record |= asdict(perplexity(ours, chosen.windows, batch=batch, progress=progress))
        else:
            origin = resolve(reference)
            theirs = load_model(origin, dtype=dtype, device=device)
            moved = divergence(ours, theirs, chosen.windows, batch=batch, progress=progress)
            record |= {"reference": str(reference), "reference_digest": model_digest(origin)}
            record |= divergence_figures(moved)
    if shares is not None:
        record |= shares.figures()
    if isinstance(ours, WithPackedCache):
        record["kv_bytes_per_token"] = ours.bytes_per_token
    if activations == "int8":
        record |= activations_cost(ours, chosen.windows, batch=batch, progress=progress)
    record["seconds"] = round(time.monotonic() - began, 3)
    return record


def activations_cost(
    model: PreTrainedModel | WithPackedCache,
    windows: Tensor | Sequence[Tensor],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what int8 activations cost a packed model: both perplexities, KL(exact ‖ int8).

    Keys: `exact_perplexity` and `int8_perplexity`, `int8_kl_mean`, `int8_kl_median`, `int8_kl_p99`
    and `int8_top1_agreement`.  The model is left with int8 activations.
    """
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError(
            "activations must be exact for a model that is not packed, not 'int8'. Use exact."
        )
    modes = (_InMode(model, "int8"), _InMode(model, "exact"))
    try:
        found = divergence(*modes, windows, batch=batch, progress=progress)
    finally:
        set_activations(model, "int8")
    return {
        "exact_perplexity": found.reference.perplexity,
        "int8_perplexity": found.model.perplexity,
        "int8_kl_mean": found.kl_mean,
        "int8_kl_median": found.kl_median,
        "int8_kl_p99": found.kl_p99,
        "int8_top1_agreement": found.top1_agreement,
    }


class _InMode(nn.Module):
    """A model that computes with one kind of activations; two of them may share the model."""

    def __init__(self, model: PreTrainedModel | WithPackedCache, activations: str) -> None:
        super().__init__()
        self.model, self.activations = model, activations
        self.device = model.device

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's."""
        return self.model.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        """Run the model in this mode."""
        set_activations(self.model, self.activations)
        return self.model(**inputs)


def _overlap_with_calibration(
    path: Path, text_digest: str, used: list[str], documents: Sequence[str]
) -> dict[str, float]:
    """Measure how much of the evaluated text was calibrated on, and warn; nothing where unknown.

    Without the calibration text, the sketch and the digest that recipe.json keeps of it serve.
    """
    known = _calibration_facts(path)
    if documents:
        share = overlap(documents, used)
    elif isinstance(known.get("sketch"), str):
        share = sketched_overlap(known["sketch"], used)
    else:
        return {}
    warn_of_overlap(share)
    if known.get("digest") == text_digest and share <= TOLERATED:
        logger.warning(
            "The evaluation text is the calibration text, if other parts of it. "
            "Evaluate on a text that was not calibrated on."
        )
    return {"calibration_overlap": share}


def _calibration_facts(path: Path) -> dict[str, Any]:
    """Read what recipe.json says of the calibration text; nothing for a model without one."""
    try:
        facts = json.loads((path / "recipe.json").read_text())["calibration"]["text"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _runs(text: EvaluationText) -> list[Tensor]:
    """Return the stretches of unbroken text among the tokens that are evaluated."""
    return [text.windows.flatten()] if isinstance(text.windows, Tensor) else text.windows


def divergence_figures(result: DivergenceResult) -> dict[str, Any]:
    """Flatten a divergence into the keys of a record."""
    figures = asdict(result)
    figures |= figures.pop("model")
    figures["reference_perplexity"] = figures.pop("reference")["perplexity"]
    return figures


def open_text(
    tokenizer: Tokenizer,
    text: str | Path,
    *,
    seqlen: int,
    split: str = "test",
    limit: int | None = None,
    by_document: bool = False,
) -> EvaluationText:
    """Read a text and cut it; the standard library has BOS before each module, as in its rule."""
    documents = read_text(text, split)
    name = str(text)
    windows: Tensor | list[Tensor]
    if by_document:
        windows = document_sequences(tokenizer, documents, seqlen, limit=limit, name=name)
    else:
        bos_each = name.split(":")[0] == "stdlib" and tokenizer.bos_token_id is not None
        windows = token_windows(
            tokenizer, documents, seqlen, limit=limit, bos_each=bos_each, name=name
        )
    return EvaluationText(name, documents, windows)


def load_model(
    path: Path,
    *,
    activations: str = "exact",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a causal language model, refusing one of which any weight would be made up.

    transformers fills missing weights with random numbers and goes on; that is never what is to be
    measured.  `activations` is how packed layers compute: "exact" or "int8".
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a constructor raises at numbers that make no sense
        raise ValueError(
            f"{path / 'config.json'} must describe a model that can be built, which it does not "
            f"({type(error).__name__}). Copy or make the model again."
        ) from error
    missing = sorted({*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])})
    if missing:
        raise ValueError(
            f"{path} must hold every weight of its model, not lack {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Copy it again."
        )
    set_activations(model, activations)
    return model.to(device).eval()


def model_digest(directory: Path) -> str:
    """Return the SHA-256 over name, size and content of config.json and of every tensor file."""
    digest = hashlib.sha256()
    for path in (directory / "config.json", *tensor_files(directory)):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return what the figures may depend on: packages, Python, platform and threads."""
    names = ("torch", "transformers", "tokenizers")
    return {
        "bitmosaic": __version__,
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }
