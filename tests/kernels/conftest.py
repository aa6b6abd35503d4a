"""Fixtures of the kernel tests: the instruction-set level and the number of threads in use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitmosaic.backends import _cpu

LEVELS = _cpu.levels()
DISTINCT = [each for each in LEVELS if each != "avx512" or "avx512vbmi" not in LEVELS]
"""Levels that differ in more than the tables of channel-wise weights."""


@pytest.fixture(params=DISTINCT)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one level that this machine has, after the other."""
    before = _cpu.level()
    _cpu.use_level(request.param)
    yield request.param
    _cpu.use_level(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
