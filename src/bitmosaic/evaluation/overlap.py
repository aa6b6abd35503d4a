"""How much of an evaluation text was already seen in calibration.

Texts are compared by shingles: every run of 50 characters, white space collapsed. The hash of a run
is the polynomial Σ c_j · B^(49−j) modulo 2^64, which comes from prefix sums for all positions at once:
with S_i = Σ_{k<i} c_k · B^(−k), the run at i hashes to (S_{i+50} − S_i) · B^(i+49), B being odd and so
invertible. 10 M characters take about two seconds and 250 MB.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["overlap", "warn_of_overlap"]

logger = logging.getLogger(__name__)

SHINGLE = 50
# Above this share of common shingles a measurement says little about unseen text.
# (Held-out modules of the standard library share 5 % of theirs with all the others together.)
TOLERATED = 0.01
BASE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: odd, and its bits look random
INVERSE = pow(BASE, -1, 2**64)


def overlap(
    calibration_documents: Sequence[str], evaluation_documents: Sequence[str]
) -> float:
    """Return the share, 0 to 1, of the evaluation text's shingles that occur in the calibration text.

    Documents shorter than a shingle are compared whole.
    """
    seen = np.unique(np.concatenate([_hashes(each) for each in calibration_documents] or [_NONE]))
    wanted = np.concatenate([_hashes(each) for each in evaluation_documents] or [_NONE])
    if not len(wanted) or not len(seen):
        return 0.0
    positions = np.minimum(np.searchsorted(seen, wanted), len(seen) - 1)
    return float(np.mean(seen[positions] == wanted))


def warn_of_overlap(share: float) -> None:
    """Log a warning where more than a hundredth of the evaluation text was calibrated on."""
    if share > TOLERATED:
        logger.warning(
            "%.1f %% of the evaluation text also stands in the calibration text, so its figures "
            "flatter the model. Evaluate on a text that was not calibrated on.",
            100 * share,
        )


_NONE: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)


def _hashes(document: str) -> NDArray[np.uint64]:
    text = " ".join(document.split())
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    if not len(points):
        return _NONE
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
