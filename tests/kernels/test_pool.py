"""Threads, ours and the caller's, and forks: the same result, and an end."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bitmosaic.backends import ACTIVATIONS, cpu
from kernels.cases import BACKEND, INTEGER_FORMATS, mixture, tokens

SHAPE = (1030, 900)
"""Large enough (0.5 MB packed) that the kernels share it among threads."""

TENSOR = mixture(
    (*INTEGER_FORMATS, "bf16", "pruned"), SHAPE, (64, 128), permuted=True, outliers=0.005
)


def test_threads_that_leave_torch_alone_decide_for_themselves() -> None:
    """The first to come is the first to go: neither may leave its number of threads behind."""
    threads = torch.get_num_threads()
    entered, left = threading.Event(), threading.Event()

    def stay() -> None:
        with cpu.torch_alone():
            entered.set()
            left.wait()

    with ThreadPoolExecutor() as pool:
        with cpu.torch_alone():
            other = pool.submit(stay)
            entered.wait()
        left.set()
        other.result()
    try:
        torch.set_num_threads(threads + 1)
        assert cpu.threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit(activations: str, count: int) -> None:
    x, indices = tokens(count, SHAPE[1]), torch.arange(SHAPE[0]).flip(0)
    results, tables = [], []
    for number in (1, 2, 3, 7):
        torch.set_num_threads(number)
        prepared = BACKEND.prepare(TENSOR)
        results.append(BACKEND.linear(x, prepared, activations=activations))
        tables.append(BACKEND.rows(prepared, indices, torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(table, tables[0]) for table in tables)


@pytest.mark.usefixtures("threads")
def test_several_callers_at_once() -> None:
    torch.set_num_threads(2)
    prepared = [BACKEND.prepare(TENSOR), BACKEND.prepare(mixture(("int3",), SHAPE, (64, 128)))]
    work = [
        (prepared[seed % 2], tokens(1 + seed % 5, SHAPE[1], seed=seed), ACTIVATIONS[seed % 3 > 0])
        for seed in range(60)
    ]

    def multiply(item):
        weight, x, activations = item
        return BACKEND.linear(x, weight, activations=activations)

    serial = [multiply(item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(multiply, work * 3))
    assert all(torch.equal(*pair) for pair in zip(parallel, serial * 3, strict=True))


@pytest.mark.usefixtures("threads")
def test_weights_prepared_and_dropped_while_others_run() -> None:
    torch.set_num_threads(2)
    prepared, x = BACKEND.prepare(TENSOR), tokens(1, SHAPE[1])
    expected = BACKEND.linear(x, prepared, activations="int8")

    def come_and_go(_):
        return BACKEND.linear(x, BACKEND.prepare(TENSOR), activations="int8")

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(come_and_go, range(30)))
    assert torch.equal(BACKEND.linear(x, prepared, activations="int8"), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("threads")
def test_fork_in_the_middle() -> None:
    """The child has none of the parent's workers, and maybe their locks: it must still answer."""
    torch.set_num_threads(2)
    prepared, x = BACKEND.prepare(TENSOR), tokens(1, SHAPE[1])
    expected = BACKEND.linear(x, prepared, activations="int8")
    stop = threading.Event()

    def multiply() -> torch.Tensor:
        return BACKEND.linear(x, prepared, activations="int8")

    def keep_busy() -> None:
        while not stop.is_set():
            multiply()

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(10):
            assert outcome_of_child(multiply, expected)
    finally:
        stop.set()
        busy.join()
    assert torch.equal(multiply(), expected)


def outcome_of_child(compute, expected: torch.Tensor) -> bool:
    """Tell whether a forked child computes `expected`; one that hangs is ended by its alarm."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            status = int(not all(torch.equal(compute(), expected) for _ in range(3)))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
