"""The compiled module of `csrc/scale_search.cpp`. Addresses of contiguous tensors, 0 for none."""

def run(
    weight: int,
    importance: int,
    scale: int,
    codes: int,
    error: int,
    tiles: int,
    threads: int,
) -> None:
    """Find the scales [tiles], codes [tiles, 16] and errors [tiles] of weights [tiles, 16]."""

def levels() -> list[str]:
    """List the instruction-set levels that this CPU can run, best last."""

def use_level(name: str) -> None:
    """Put another level in use, for this module alone."""
