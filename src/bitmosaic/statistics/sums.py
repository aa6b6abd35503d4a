"""The sum behind every statistic: exact, so it depends on neither order nor split.

Floating-point addition is not associative, so a plain running sum depends on the order of the
samples and on how they were split over processes. `ReproducibleSum` removes that: each contribution
is cut into integer digits at fixed binary positions and the digits are added as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitmosaic import ranks

BIN_BITS = 40
"""Width of a bin: bin j holds the binary digits of weight 2^(40 j) up to 2^(40 (j + 1))."""

CAPACITY = 2**22
"""Contributions that a sum can take: 2^22 digits below 2^40 stay below 2^62 in an int64."""

# The bins that a row's largest magnitude may fall into. The low end keeps 2^(-40 j) finite; digits
# below 2^-960 are always cut off, whatever the order. The high end is the last bin that float64
# reaches.
_LOWEST_BIN = -23
_HIGHEST_BIN = 25

# A chunk's temporaries are two 8-byte buffers of this many elements: 1 MiB each stays in the
# second-level caches. Measured on 2 cores with [5632, 2048] float32: 1.4 ns an element at 2^17 or
# 2^18, 1.8 at 2^16, 3.6 at 2^14, where calls into torch dominate.
_CHUNK_ELEMENTS = 2**17
# A GPU has no such cache, and takes microseconds to begin anything: 128 MiB each.
_GPU_CHUNK_ELEMENTS = 2**24


class ReproducibleSum:
    """A sum of float tensors whose bits depend on neither order nor split of the contributions.

    Every row (index of the first axis) keeps two int64 digits an element: those of the bin that the
    row's largest magnitude so far falls into, and of the bin below it. The error of a sum of n
    contributions is therefore below n * 2^-40 times the largest magnitude in the row.

    Why every order gives the same integers: the digits of a number in the absolute bins, those of
    its magnitude with its sign, depend on the number alone. Let J be the row's top bin after all
    contributions. A contribution x that came while the top bin was j <= J has |x| < 2^(40 (j + 1)),
    so its digits above bin j are zero; when the top bin rises to J, digits below bin J - 1 are
    dropped and the others move along. What is kept of x is thus exactly its digits in bins J and
    J - 1, at whichever moment it came. Integer addition is exact, hence associative and
    commutative, and the maximum that defines J is too; so permutations, splits and merge trees all
    end in equal states.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        """Start an empty sum of tensors of the given shape."""
        if len(shape) == 0 or any(size < 1 for size in shape):
            raise ValueError(
                "The shape of a sum must have at least one axis and positive sizes, "
                f"not {tuple(shape)!r}. Give the shape of the contributions."
            )
        self.shape = tuple(shape)
        self.count = 0
        self._rows = shape[0]
        self._columns = torch.Size(shape[1:]).numel()
        self._high = torch.zeros(self._rows, self._columns, dtype=torch.int64)
        self._low = torch.zeros_like(self._high)
        self._top = torch.full((self._rows,), _LOWEST_BIN, dtype=torch.int64)

    def add(self, contribution: Tensor, *, squared: bool = False) -> None:
        """Add one contribution, or its elementwise square taken in float64.

        Raises ValueError, and changes nothing, if the shape differs or a value is not finite.
        """
        self._check_contribution(contribution)
        matrix = contribution.detach().reshape(self._rows, self._columns)
        largest = torch.maximum(matrix.amax(dim=1).abs(), matrix.amin(dim=1).abs()).double()
        if squared:
            largest = largest.square()
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(
                "Every value of a contribution must be finite, not NaN or infinite. "
                "Check the model's weights, or calibrate in float32 if it overflows."
            )
        self._check_count(self.count + 1)
        self._raise_top(_bin_of(largest))
        into_top_bin = _power(-self._top)[:, None]
        for rows, scaled, digits in self._chunks():
            scaled.copy_(matrix[rows])
            if squared:
                scaled.square_()
            # Multiplying by a power of two, and removing a truncated part, are exact in float64.
            # Where the product underflows, both digits are zero anyway.
            scaled.mul_(into_top_bin[rows])
            digits.copy_(scaled)  # conversion truncates toward zero
            self._high[rows].add_(digits)
            scaled.sub_(digits).mul_(2.0**BIN_BITS)
            self._low[rows].add_(digits.copy_(scaled))
        self.count += 1

    def merge(self, other: ReproducibleSum) -> None:
        """Add another sum of the same shape, as if its contributions had been added here."""
        if other.shape != self.shape:
            raise ValueError(
                f"The shape of a merged sum must be {self.shape}, not {other.shape}. "
                "Merge statistics of the same matrix only."
            )
        self._check_count(self.count + other.count)
        self._raise_top(other._top)
        rise = (self._top - other._top)[:, None]
        stays, moves = (rise == 0).long(), (rise == 1).long()
        for rows, _, digits in self._chunks():
            self._high[rows].add_(torch.mul(other._high[rows], stays[rows], out=digits))
            self._low[rows].add_(torch.mul(other._low[rows], stays[rows], out=digits))
            self._low[rows].add_(torch.mul(other._high[rows], moves[rows], out=digits))
        self.count += other.count

    def join(self) -> None:
        """Add up what all processes of the job have summed, each becoming the whole.

        The sums are of integers in the same bins, so no order of the processes changes a bit.
        """
        top, count = self._top.clone(), torch.tensor([self.count])
        ranks.largest(top)
        ranks.add(count)
        self._check_count(int(count))
        self._raise_top(top)
        ranks.add(self._high)
        ranks.add(self._low)
        self.count = int(count)

    def value(self) -> Tensor:
        """Return the sum, rounded to float32.

        Raises OverflowError where a sum exceeds the range of float32.
        """
        result = torch.empty_like(self._high, dtype=torch.float32)
        high_unit = _power(self._top)[:, None]
        low_unit = _power(self._top - 1)[:, None]
        for rows, high, digits in self._chunks():
            low = digits.view(torch.float64)  # the other buffer under its other type
            high.copy_(self._high[rows]).mul_(high_unit[rows])
            low.copy_(self._low[rows]).mul_(low_unit[rows])
            result[rows].copy_(high.add_(low))
        if not bool(torch.isfinite(torch.stack([result.amin(), result.amax()])).all()):
            raise OverflowError(
                "A sum must stay within the range of float32, not exceed "
                f"{torch.finfo(torch.float32).max:.3g}. Scale the contributions down."
            )
        return result.reshape(self.shape)

    def state(self) -> dict[str, Tensor]:
        """Return the exact accumulator: `high` and `low` digits, `top` bin of each row, `count`.

        The two digit tensors are the live ones, not copies: they change with the next addition.
        """
        return {
            "high": self._high.view(self.shape),
            "low": self._low.view(self.shape),
            "top": self._top.to(torch.int8),
            "count": torch.tensor([self.count], dtype=torch.int64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> ReproducibleSum:
        """Rebuild a sum from a copy of `state()`.

        Raises ValueError if the tensors cannot be the state of any sum.
        """
        count = _check_state(state)
        result = cls(tuple(state["high"].shape))
        result._assign(state, count)
        return result

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Replace everything added so far by a copy of the `state()` of a sum of the same shape."""
        count = _check_state(state)
        if tuple(state["high"].shape) != self.shape:
            raise ValueError(
                f"The digits of a sum must have the shape {self.shape}, "
                f"not {tuple(state['high'].shape)}. Load the state of the same matrix."
            )
        self._assign(state, count)

    def _assign(self, state: dict[str, Tensor], count: int) -> None:
        self.count = count
        self._high.copy_(state["high"].reshape(self._high.shape))
        self._low.copy_(state["low"].reshape(self._low.shape))
        self._top.copy_(state["top"])

    def _check_contribution(self, contribution: Tensor) -> None:
        if tuple(contribution.shape) != self.shape:
            raise ValueError(
                f"The shape of a contribution must be {self.shape}, "
                f"not {tuple(contribution.shape)}. Pass a tensor of this matrix."
            )
        if not contribution.is_floating_point():
            raise TypeError(
                f"A contribution must be a floating-point tensor, not {contribution.dtype}. "
                "Convert it first."
            )

    def _check_count(self, count: int) -> None:
        if count > CAPACITY:
            raise OverflowError(
                f"A sum must have at most {CAPACITY} contributions, not {count}. "
                "Calibrate on fewer sequences."
            )

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Walk over the rows in chunks, with a float64 and an int64 buffer reused by each."""
        # Buffers made anew for each chunk would be mapped and unmapped each time, which costs more
        # than the arithmetic.
        chunk = _CHUNK_ELEMENTS if self._high.is_cpu else _GPU_CHUNK_ELEMENTS
        step = min(self._rows, max(1, chunk // self._columns))
        floats = torch.empty(step, self._columns, dtype=torch.float64, device=self._high.device)
        integers = torch.empty_like(floats, dtype=torch.int64)
        for start in range(0, self._rows, step):
            size = min(step, self._rows - start)
            yield slice(start, start + size), floats[:size], integers[:size]

    def _raise_top(self, required: Tensor) -> None:
        """Raise each row's top bin to at least the required one, moving or dropping digits."""
        rise = (required - self._top).clamp_(min=0)[:, None]
        self._top += rise[:, 0]
        if self.count == 0 or not bool(rise.any()):  # an empty sum has no digits to move
            return
        stays, moves = (rise == 0).long(), (rise == 1).long()
        for rows, _, digits in self._chunks():
            torch.mul(self._high[rows], moves[rows], out=digits)
            self._low[rows].mul_(stays[rows]).add_(digits)
            self._high[rows].mul_(stays[rows])


def _bin_of(magnitude: Tensor) -> Tensor:
    """Return the bin that holds each magnitude's leading digit, at least the lowest one."""
    exponent = torch.frexp(magnitude).exponent.long() - 1
    bins = torch.div(exponent, BIN_BITS, rounding_mode="floor").clamp_(min=_LOWEST_BIN)
    return torch.where(magnitude > 0, bins, _LOWEST_BIN)


# torch.ldexp with integer exponents goes through float32 and overflows, so the powers come from a
# table of Python floats.
_LARGEST_POWER = max(_HIGHEST_BIN, 1 - _LOWEST_BIN)
_POWERS = torch.tensor(
    [2.0 ** (BIN_BITS * j) for j in range(-_LARGEST_POWER, _LARGEST_POWER + 1)], dtype=torch.float64
)


def _power(bins: Tensor) -> Tensor:
    """Return 2^(40 j) for each bin j."""
    return _POWERS.to(bins.device)[bins + _LARGEST_POWER]


def _check_state(state: dict[str, Tensor]) -> int:
    """Check that the tensors can be the state of a sum, and return its count."""
    wanted = {"high": torch.int64, "low": torch.int64, "top": torch.int8, "count": torch.int64}
    found = {name: tensor.dtype for name, tensor in state.items()}
    if found != wanted:
        raise ValueError(f"The state of a sum must hold {wanted}, not {found}. Calibrate again.")
    high, low, top, count = state["high"], state["low"], state["top"], state["count"]
    if (
        high.dim() == 0
        or high.shape != low.shape
        or top.shape != high.shape[:1]
        or count.numel() != 1
    ):
        raise ValueError(
            "The state of a sum must have digits of one shape and one bin for each row, "
            f"not {[tuple(tensor.shape) for tensor in state.values()]}. Calibrate again."
        )
    number = int(count)
    if not 0 <= number <= CAPACITY:
        raise ValueError(
            f"The count of a sum must be within 0 and {CAPACITY}, not {number}. Calibrate again."
        )
    if high.numel() and (int(top.min()) < _LOWEST_BIN or int(top.max()) > _HIGHEST_BIN):
        raise ValueError(
            f"The bins of a sum must be within {_LOWEST_BIN} and {_HIGHEST_BIN}, "
            f"not {int(top.min())} and {int(top.max())}. Calibrate again."
        )
    limit = number * (2**BIN_BITS - 1)
    for name in ("high", "low"):
        smallest, largest = int(state[name].amin()), int(state[name].amax())
        if smallest < -limit or largest > limit:
            raise ValueError(
                f"The {name} digits of a sum of {number} contributions must be within ±{limit}, "
                f"not {smallest} and {largest}. Calibrate again."
            )
    return number
