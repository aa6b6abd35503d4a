"""The compiled module of `csrc/kmeans.cpp`. Addresses of contiguous float32 tensors, 0 for none."""

def run(
    optimal: bool,
    values: int,
    weights: int,
    start: int,
    centres: int,
    rows: int,
    length: int,
    count: int,
    steps: int,
    threads: int,
) -> None:
    """Find the centres [rows, count] of values [rows, length], the best ones or Lloyd's."""
