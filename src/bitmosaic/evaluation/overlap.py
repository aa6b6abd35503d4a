"""How much of an evaluation text was already seen in calibration.

Texts are compared by shingles: every run of 50 characters, white space collapsed. The hash of a
run is the polynomial Σ c_j · B^(49−j) modulo 2^64, which comes from prefix sums for all positions
at once: with S_i = Σ_{k<i} c_k · B^(−k), the run at i hashes to (S_{i+50} − S_i) · B^(i+49), B
being odd and so invertible. Only the evaluation text's shingles are kept.
"""

import base64
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["overlap", "sketch", "sketched_overlap", "warn_of_overlap"]

logger = logging.getLogger(__name__)

SHINGLE = 50
# Above this share of common shingles a measurement says little about unseen text.
# (Held-out modules of the standard library share 5 % of theirs with all the others together.)
TOLERATED = 0.01
BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: odd, and its bits look random
INVERSE = pow(BASE, -1, 2**64)
SKETCH = 1024  # 8 KiB; 64 windows of 512 tokens have some 100,000 shingles


def overlap(calibration_documents: Sequence[str], evaluation_documents: Sequence[str]) -> float:
    """Return the share, 0 to 1, of the evaluation's shingles that the calibration text has too.

    Documents shorter than a shingle are compared whole.
    """
    if not evaluation_documents:
        return 0.0
    hashes = np.concatenate([_hashes(document) for document in evaluation_documents])
    wanted, counts = np.unique(hashes, return_counts=True)
    if not len(wanted):
        return 0.0
    found = np.zeros(len(wanted), dtype=bool)
    for document in calibration_documents:
        seen = _hashes(document)
        positions = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        found[positions[wanted[positions] == seen]] = True
    return float(counts[found].sum() / counts.sum())


def sketch(documents: Sequence[str]) -> str:
    """Return the `SKETCH` smallest of the documents' distinct shingle hashes, in base64.

    The hashes are mixed first, so that the smallest are a random sample of the shingles.
    """
    parts = [_mixed(_hashes(document)) for document in documents]
    hashes = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)
    return base64.b64encode(hashes[:SKETCH].astype("<u8").tobytes()).decode()


def sketched_overlap(calibration: str, evaluation_documents: Sequence[str]) -> float:
    """Estimate `overlap` from a sketch of the calibration text.

    Exact where the calibration text has fewer shingles than a sketch holds. Else those of the
    evaluation's shingles count that lie below the sketch's largest: of n of them the estimate's
    standard error is sqrt(p (1 - p) / n).
    """
    kept = np.frombuffer(base64.b64decode(calibration), dtype="<u8").astype(np.uint64)
    if not len(kept) or not evaluation_documents:
        return 0.0
    hashes = np.concatenate([_mixed(_hashes(document)) for document in evaluation_documents])
    if len(kept) >= SKETCH:
        hashes = hashes[hashes <= kept[-1]]
    return float(np.isin(hashes, kept).mean()) if len(hashes) else 0.0


def warn_of_overlap(share: float) -> None:
    """Log a warning where more than a hundredth of the evaluation text was calibrated on."""
    if share > TOLERATED:
        logger.warning(
            "%.1f %% of the evaluation text also stands in the calibration text, so its figures "
            "flatter the model. Evaluate on a text that was not calibrated on.",
            100 * share,
        )


def _hashes(document: str) -> NDArray[np.uint64]:
    text = " ".join(document.split())
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    if not len(points):
        return np.zeros(0, dtype=np.uint64)
    length = min(SHINGLE, len(points))
    powers = _powers(BASE, len(points))
    # uint64 arithmetic wraps, which is the reduction modulo 2^64.
    sums = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum(points.astype(np.uint64) * _powers(INVERSE, len(points)), out=sums[1:])
    hashes = (sums[length:] - sums[:-length]) * powers[: len(points) - length + 1]
    hashes *= np.uint64(pow(BASE, length - 1, 2**64))
    return hashes


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread hashes evenly over 64 bits: two rounds of shift-exclusive-or and an odd multiplier."""
    mixed = hashes.copy()
    for shift in (32, 29):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(BASE)
    return mixed ^ (mixed >> np.uint64(32))
