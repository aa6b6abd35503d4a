"""A whole model on the CPU: loading, decoding and prefill, against llama.cpp's llama-bench.

    python benchmarks/model.py [--quick] [--threads 2] --json OUT

Every figure is printed beside what is asked; the exit code is 1 where one is missed.

The model has Llama-3.2-1B's geometry and random weights; speed does not depend on what they are.
It is loaded by `bitmosaic.load`, from files that the system holds in its cache, and generates as
`bitmosaic generate` does; what transformers' own `model.generate` reaches stands beside it.
llama.cpp runs the same geometry in its nearest type, and in the two beside it for comparison; both
take turns, and the best turn of each counts.

`--quick` leaves llama.cpp out.  Without it `benchmarks/peers.sh` must have run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from figures import at_least, at_most, finish

NEAREST = "Q3_K"
BESIDE = ("Q2_K", "Q4_K")
PROMPT, TOKENS, TURNS = 512, 64, 3
SECONDS, MEMORY_SHARE, MEMORY_BASE = 3.0, 1.3, 300e6

Rows = list[dict[str, Any]]


def measure(directory: Path, threads: int, quick: bool) -> Rows:
    """Write the model, load it in a process of its own, then take turns with llama.cpp."""
    import model_files

    facts = model_files.write_packed(directory)
    print(f"  {facts['packed_bytes'] / 1e6:.0f} MB, blocks {facts['bits_per_weight']:.3f} bits")
    loads = [in_child("load", directory, threads) for _ in range(1 if quick else 3)]
    seconds = min(load["load_seconds"] for load in loads)
    peak, limit = loads[0]["peak_bytes"], MEMORY_SHARE * facts["packed_bytes"] + MEMORY_BASE
    details = {**loads[0], **facts}
    rows = [
        at_most("loading the model", seconds, SECONDS, "s", details=details),
        at_most("peak memory of loading", peak / 1e6, limit / 1e6, "MB", details=details),
    ]
    turns: dict[str, list[dict[str, float]]] = {"bitmosaic": []}
    for turn in range(1 if quick else TURNS):
        turns["bitmosaic"].append(in_child("run", directory, threads))
        if not quick:
            for kind in (NEAREST, *BESIDE) if turn == 0 else (NEAREST,):
                turns.setdefault(kind, []).append(_llama_bench(kind, threads))
    for name, found in turns.items():
        best = {key: max(each[key] for each in found) for key in found[0]}
        speeds = ", ".join(f"{what} {speed:6.1f}" for what, speed in best.items())
        print(f"    {name:10} {speeds} tokens/s", flush=True)
        rows.append({"contender": name, "threads": threads, "turns": len(found), **best})
    return rows if quick else rows + _judge(turns, threads)


def _judge(turns: dict[str, list[dict[str, float]]], threads: int) -> Rows:
    rows = []
    for what, asked in (("decode", 1.2), ("prefill", 1.0)):
        ours, theirs = (max(t[what] for t in turns[name]) for name in ("bitmosaic", NEAREST))
        title = f"{what}, whole model, {threads} threads: speed over llama.cpp {NEAREST}"
        details = {"tokens_per_second": ours, "llama_cpp": theirs}
        rows.append(at_least(title, ours / theirs, asked, details=details))
    return rows


def in_child(what: str, directory: Path, threads: int) -> dict[str, float]:
    """Run one of the two functions below in a fresh process."""
    command = [sys.executable, __file__, "--child", what, str(directory), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def load(directory: Path) -> dict[str, float]:
    """Time loading, and tell the most memory the process ever held."""
    start = time.perf_counter()
    import bitmosaic.integrations.loading  # noqa: F401

    imported = time.perf_counter() - start
    before = _peak_bytes()
    _load(directory)
    return {
        "import_seconds": imported,
        "load_seconds": time.perf_counter() - start - imported,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_of_imports": before,
    }


def run(directory: Path) -> dict[str, float]:
    """Tokens a second, the best of some passes: of a prompt, and of what follows a short one."""
    import torch
    from transformers import AutoTokenizer

    from bitmosaic.evaluation.generation import generate

    model, tokenizer = _load(directory), AutoTokenizer.from_pretrained(directory)
    best = {"decode": 0.0, "prefill": 0.0, "model.generate": 0.0}
    for _ in range(2):
        text = generate(model, tokenizer, "word", tokens=1 + TOKENS)
        best["decode"] = max(best["decode"], text.tokens_per_second)
        text = generate(model, tokenizer, "word " * PROMPT, tokens=1)
        best["prefill"] = max(best["prefill"], text.prompt_tokens / text.prompt_seconds)
        start = time.perf_counter()
        model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=TOKENS, do_sample=False)
        seconds = time.perf_counter() - start
        best["model.generate"] = max(best["model.generate"], TOKENS / seconds)
    return best


def _load(directory: Path) -> Any:
    import torch

    from bitmosaic.integrations.loading import load as load_packed

    return load_packed(directory, dtype=torch.float32, activations="int8")


def _peak_bytes() -> int:
    """Read the high-water mark of resident memory; getrusage would count the parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status must have a line VmHWM, as on Linux.")


def _llama_bench(kind: str, threads: int) -> dict[str, float]:
    import model_files

    path = peers.PEERS / "models" / f"random-1b-{kind}.gguf"
    model_files.write_gguf(path, kind)
    sizes = ["-p", str(PROMPT), "-n", str(TOKENS), "-t", str(threads), "-r", "2"]
    command = [str(peers.LLAMA / "llama-bench"), "-m", str(path), *sizes, "-o", "json"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(peers.LLAMA)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    best = {row["n_gen"]: max(row["samples_ts"]) for row in json.loads(done.stdout)}
    return {"decode": best[TOKENS], "prefill": best[0]}


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write, and judge."""
    if arguments[:1] == ["--child"]:
        what, directory, threads = arguments[1:]
        import torch

        torch.set_num_threads(int(threads))
        print(json.dumps({"load": load, "run": run}[what](Path(directory))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without llama.cpp, one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if not given.quick and not peers.installed():
        sys.exit("The peers must be installed. Run benchmarks/peers.sh, or give --quick.")
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), given.threads, given.quick)
    return finish(rows, given.json, **({} if given.quick else peers.versions()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
