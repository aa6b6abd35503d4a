"""Several processes at one job, as `torchrun` starts them; without it, one process that is first.

This is all that the project knows of torch.distributed.  Every process runs the same stages.  The
first owns the files: it alone reads and writes outputs, statistics and plans, so hosts need not
share a directory, and tells the others what is in them.  A process works on the samples, blocks or
matrices that are its own; sums over processes are of integers, hence exact in any order.

    with ranks.joined():
        for sample in ranks.part(samples): ...   # my share
        ranks.add(counts)                        # everyone's, in place
        facts = ranks.told(lambda: read(path))   # read by the first, known to all

Outside `joined`, and in a job of one, nothing is sent and functions give back what they are given.
CPU tensors travel by gloo, or by nccl where every process of a host has a GPU of its own.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bitmosaic.ranks.watch import LostRankError, Watch, interface

logger = logging.getLogger(__name__)

__all__ = [
    "LostRankError",
    "add",
    "agree",
    "count",
    "everyone",
    "first",
    "given",
    "index",
    "joined",
    "largest",
    "part",
    "passed",
    "speaks",
    "told",
]

_JOINING = timedelta(minutes=5)
"""How long all processes may take to come together; imports from a cold disk take a minute."""
_WAITING = timedelta(days=30)
"""How long one may wait for the others' results.  No limit in effect: who dies is noticed by the
watch, and who rounds a large matrix may take hours."""
_CHUNK = 2**26
"""Bytes that travel at once, so that buffers on the way stay small."""

File = tuple[Mapping[str, Tensor], Mapping[str, str]]

_watch: Watch | None = None
_device = torch.device("cpu")
_jobs = 0
"""How often this process has joined: each time has names of its own in the store."""


def count() -> int:
    """How many processes there are."""
    return 1 if _watch is None else _watch.count


def on_host() -> int:
    """Return how many processes of the job run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def index() -> int:
    """Which of the processes this is, from 0."""
    return 0 if _watch is None else _watch.index


def first() -> bool:
    """Whether this process owns the files."""
    return index() == 0


def part(items: int, of: int | None = None) -> range:
    """Return the own share of so many items in order, or that of another process."""
    own = index() if of is None else of
    return range(items * own // count(), items * (own + 1) // count())


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun has started, if any, until the block ends.

    Where a process fails, dies or is interrupted, all end: the others raise its error with its name
    (ValueError for bad input, KeyboardInterrupt, else LostRankError), or are ended after seconds.

    Raises:
        LostRankError: The others could not be reached, or one of them is gone.
    """
    global _watch
    if _watch is not None or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    _watch = _join()
    try:
        _agree_on_software()
        yield
        _run(dist.barrier)
    except BaseException as error:
        _watch.fail(error)
        raise
    # After a failure the group is left as it is: to take it down may be to wait for the dead.
    _watch.close()
    dist.destroy_process_group()
    _watch = None


def add(tensor: Tensor) -> None:
    """Replace integers by their sum over all processes, in place."""
    _reduce(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> None:
    """Replace integers by the largest among all processes, in place."""
    _reduce(tensor, dist.ReduceOp.MAX)


def given(
    make: Callable[[], Mapping[str, Tensor]], *, by: int = 0, to: int | None = None
) -> dict[str, Tensor]:
    """Let process `by` make named tensors and give them to process `to`, or (None) to all.

    All processes must call it; `make` runs in one, and those that get nothing return no tensors.
    """
    return passed(lambda: (make(), {}), by=by, to=to)[0]


def passed(
    make: Callable[[], File], *, by: int = 0, to: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Do the same for what a file holds: named tensors, and text by name."""
    made, text = make() if index() == by else ({}, {})
    tensors, metadata = dict(made), dict(text)
    if count() == 1 or to == by:
        return tensors, metadata
    if to is not None and index() not in (by, to):
        return {}, {}
    described = [(name, str(each.dtype), list(each.shape)) for name, each in tensors.items()]
    head = _packed([described, metadata])
    size = torch.tensor([head.numel()])
    _move(size, by, to)
    head = head if index() == by else torch.empty(int(size), dtype=torch.uint8)
    _move(head, by, to)
    described, metadata = json.loads(head.numpy().tobytes())
    for name, kind, shape in described:
        if index() != by:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, kind.removeprefix("torch.")))
        _move(tensors[name].detach().contiguous().reshape(-1), by, to)
    return (tensors, metadata) if to is None or index() == to else ({}, {})


def told(make: Callable[[], Any], *, by: int = 0) -> Any:
    """Let one process find out a plain JSON value, and tell all."""
    if count() == 1:
        return make()
    return json.loads(given(lambda: {"": _packed(make())}, by=by)[""].numpy().tobytes())


def everyone(value: Any) -> list[Any]:
    """Return the plain JSON values of all processes."""
    return [told(lambda: value, by=each) for each in range(count())]


def agree(thing: str, value: Any, remedy: str) -> None:
    """Refuse to go on where a plain JSON value is not the same in all processes."""
    values = everyone(value)
    for each, theirs in enumerate(values):
        if theirs != values[0]:
            assert _watch is not None
            raise ValueError(
                f"{thing} must be the same in all processes, not {values[0]!r} in process 0 on "
                f"{_watch.hosts[0]} and {theirs!r} in process {each} on {_watch.hosts[each]}. "
                f"{remedy}"
            )


def speaks() -> bool:
    """Whether this process is the one to say on its host how the job has ended."""
    if _watch is not None:
        return _watch.speaks()
    return _jobs > 0 or os.environ.get("LOCAL_RANK", "0") == "0"  # each its own trouble in joining


def _join() -> Watch:
    """Meet the other processes: the watch first, which knows who is missing, then the group."""
    global _device, _jobs
    _jobs += 1
    own, total = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(dist.rendezvous("env://", own, total, timeout=_JOINING))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise LostRankError(
            f"process {own} of {total} must reach the others at "
            f"{os.environ.get('MASTER_ADDR')}, but cannot ({error}). Start it by torchrun."
        ) from error
    store = dist.PrefixStore(f"bitmosaic/{_jobs}", store)
    watch = Watch(own, total, store, _JOINING.total_seconds())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    store.set(f"gpu/{own}", str(int(gpus >= on_host())))
    if all(store.get(f"gpu/{each}") == b"1" for each in range(total)):
        _device = torch.device("cuda", local)
        torch.cuda.set_device(_device)
    if name := interface():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    dist.init_process_group(
        "gloo" if _device.type == "cpu" else "nccl",
        store=dist.PrefixStore("group", store),
        rank=own,
        world_size=total,
        timeout=_WAITING,
    )
    return watch


def _agree_on_software() -> None:
    """Refuse what would change bytes: other versions, or other numbers of threads."""
    import bitmosaic  # lazy: this module lies below

    agree(
        "versions of bitmosaic, torch and Python, and the command",
        [bitmosaic.__version__, torch.__version__, sys.version.split()[0], *sys.argv[1:]],
        "Start the same command of the same installation everywhere.",
    )
    agree(
        "the number of threads",
        torch.get_num_threads(),
        "Set OMP_NUM_THREADS to the same everywhere.",
    )
    kinds = everyone([platform.machine(), torch.backends.cpu.get_cpu_capability()])
    if first() and any(kind != kinds[0] for kind in kinds):
        logger.warning(
            "the processes run on different processors (%s), whose sums may differ in their last "
            "bits: the bytes of this result may differ from those of one process",
            ", ".join(sorted({" ".join(kind) for kind in kinds})),
        )


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if count() == 1:
        return
    assert not tensor.is_floating_point(), "sums of floats depend on their order"
    flat = tensor.view(-1)
    for piece in flat.split(max(1, _CHUNK // tensor.element_size())):
        sent = piece.to(_device)
        _run(dist.all_reduce, sent, operation)
        if sent is not piece:
            piece.copy_(sent)


def _move(tensor: Tensor, by: int, to: int | None) -> None:
    """Send a flat tensor's bytes from one process to another, or to all."""
    for piece in tensor.view(torch.uint8).split(_CHUNK):
        sent = piece.to(_device)
        if to is None:
            _run(dist.broadcast, sent, by)
        elif index() == by:
            _run(dist.send, sent, to)
        else:
            _run(dist.recv, sent, by)
        if sent is not piece and index() != by:
            piece.copy_(sent)


def _run(call: Callable[..., Any], *arguments: Any) -> None:
    """Run what waits for others; where one of them is gone, say which."""
    assert _watch is not None
    try:
        call(*arguments)
    except RuntimeError as error:
        raise _watch.explain(error) from error
