"""The state of the backward sweep as a file of the first process, for all samples of the job."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from bitmosaic import checkpoint, ranks
from bitmosaic.model.kept import KeptStates
from bitmosaic.model.sweep import Sweep

_FILE = "gradients.safetensors"


def save_gradients(directory: Path, sweep: Sweep, samples: int, memory_cap: int) -> None:
    """Write the gradients of all samples, those of other processes fetched one by one."""
    state = sweep.gradients
    if ranks.count() > 1:
        states = _gathered(state["states"], samples, directory, memory_cap)
        if states is not None:
            checkpoint.write_tensors(
                directory / _FILE, {"index": state["index"], "states": states.stacked()}
            )
            states.release()
    else:
        checkpoint.write_tensors(directory / _FILE, state)


def restore_gradients(directory: Path, sweep: Sweep, samples: int) -> int:
    """Set the own samples' gradients to what was saved; return the block that they belong to."""
    saved = checkpoint.read_tensors(directory / _FILE)[0] if ranks.first() else {}
    index = int(ranks.told(lambda: int(saved["index"])))
    for process in range(ranks.count()):
        part = ranks.part(samples, process)

        def of_part(part: range = part) -> dict[str, Tensor]:
            return {"states": saved["states"][part.start : part.stop]}

        own = ranks.given(of_part, to=process)
        if own:
            sweep.gradients = {"index": torch.tensor([index]), **own}
    return index


def drop_gradients(directory: Path) -> None:
    """Remove the file, which is of no use beside finished statistics."""
    if ranks.first():
        (directory / _FILE).unlink(missing_ok=True)


def clear_gradients(directory: Path) -> None:
    """Remove from finished statistics what a kill at their end left of the way there."""
    with suppress(OSError):  # of a directory that is only to be read: it does no harm
        drop_gradients(directory)


def _gathered(own: Tensor, samples: int, directory: Path, memory_cap: int) -> KeptStates | None:
    """Bring the states of all processes to the first, one sample at a time."""
    whole = None
    if ranks.first():
        shape = (samples, own.shape[1], own.shape[2])
        fits = math.prod(shape) * own.element_size() <= memory_cap
        whole = KeptStates(shape, own.dtype, in_memory=fits, directory=directory)
    for process in range(ranks.count()):
        part = ranks.part(samples, process)
        for sample in part:

            def one(sample: int = sample, first: int = part.start) -> dict[str, Tensor]:
                return {"state": own[sample - first]}

            state = ranks.given(one, by=process, to=0)
            if whole is not None:
                whole.write(sample, state["state"])
    return whole
