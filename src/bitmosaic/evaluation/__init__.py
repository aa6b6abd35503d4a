"""Measuring a model: perplexity, divergence from its original, on texts from anywhere."""

from bitmosaic.evaluation.divergence import DivergenceResult, divergence
from bitmosaic.evaluation.overlap import overlap, warn_of_overlap
from bitmosaic.evaluation.packed_cache import WithPackedCache
from bitmosaic.evaluation.perplexity import PerplexityResult, perplexity
from bitmosaic.evaluation.record import (
    EvaluationText,
    activations_cost,
    divergence_figures,
    evaluate,
    load_model,
    model_digest,
    open_text,
    versions,
)
from bitmosaic.evaluation.text import (
    document_sequences,
    read_text,
    stdlib_documents,
    stdlib_windows,
    text_digest,
    token_windows,
)

__all__ = [
    "DivergenceResult",
    "EvaluationText",
    "PerplexityResult",
    "WithPackedCache",
    "activations_cost",
    "divergence",
    "divergence_figures",
    "document_sequences",
    "evaluate",
    "load_model",
    "model_digest",
    "open_text",
    "overlap",
    "perplexity",
    "read_text",
    "stdlib_documents",
    "stdlib_windows",
    "text_digest",
    "token_windows",
    "versions",
    "warn_of_overlap",
]
