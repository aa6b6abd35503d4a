"""Many at once: threads that share a model, and processes that want the same directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import reliability_kit as kit
from figures import ROOT, at_least, at_most

THREADS = 8


def run(parent: Path, quick: bool) -> list[dict[str, Any]]:
    """Serve from threads, and race processes; rows for reliability.py."""
    made = kit.make_kit(parent / "together", "llama")
    return [*_served(made, parent, 4 if quick else 60), *_raced(made, parent, 2 if quick else 20)]


def _served(made: Path, parent: Path, seconds: int) -> list[dict[str, Any]]:
    """Let a process of its own serve one model from threads: this one must stay without any."""
    command = kit.quantizing(made, "sfmp")
    with kit.fresh(command, parent) as place:
        kit.done(command, place)
        words = [sys.executable, __file__, str(place / "out"), str(seconds)]
        path = os.pathsep.join((str(ROOT / "tests"), str(ROOT / "benchmarks")))
        ended = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
    if ended.returncode:
        print(f"     WRONG served: {ended.stderr[-600:]}")
        return [at_most("together: the serving process failed", 1, 0, "processes")]
    calls, different, spent, threads = (float(each) for each in ended.stdout.split()[-4:])
    return [
        at_least(f"together: seconds that {THREADS} threads served one model", spent, seconds, "s"),
        at_least("together: their answers", calls, THREADS, "answers"),
        at_most("together: answers unlike the serial ones", different, 0, "answers"),
        at_most("together: torch threads changed by it", threads, 0, "threads"),
    ]


def serve(directory: str, seconds: float) -> None:
    """Compare what threads get with what one gets alone: logits to the bit, and generated text."""
    import torch

    import bitmosaic
    from architectures import tokens
    from bitmosaic.backends import cpu
    from bitmosaic.evaluation.generation import generate
    from bitmosaic.evaluation.model import open_tokenizer

    torch.set_num_threads(2)
    model = bitmosaic.load(directory, dtype=torch.float32).eval()
    tokenizer = open_tokenizer(Path(directory))
    prompts = tokens(THREADS, 20)

    def answer(number: int) -> tuple[torch.Tensor, str]:
        with torch.no_grad():
            found = model(prompts[number : number + 1], use_cache=False).logits
        text = tokenizer.decode(prompts[number, :5])
        return found, generate(model, tokenizer, text, tokens=8).text

    alone = [answer(number) for number in range(THREADS)]
    threads = torch.get_num_threads()
    counts, different = [0] * THREADS, [0] * THREADS
    began = time.perf_counter()

    def serve_one(number: int) -> None:
        while time.perf_counter() - began < seconds:
            logits, text = answer(number)
            different[number] += not torch.equal(logits, alone[number][0])
            different[number] += text != alone[number][1]
            counts[number] += 1

    workers = [threading.Thread(target=serve_one, args=(each,)) for each in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    spent = time.perf_counter() - began
    after = answer(0)
    different[0] += not torch.equal(after[0], alone[0][0])
    changed = abs(torch.get_num_threads() - threads) + abs(cpu.threads() - threads)
    print(sum(counts), sum(different), spent, changed)


def _raced(made: Path, parent: Path, races: int) -> list[dict[str, Any]]:
    """Start the same command twice at different distances in time."""
    won = told = 0
    wrong: list[str] = []
    for number in range(races):
        command = (kit.quantizing(made, "sfmp"), kit.calibrating(made))[number % 2]
        with kit.fresh(command, parent) as place:
            whole = kit.content(place) if kit.done(command, place).code == 0 else {}
        with kit.fresh(command, parent) as place:
            first = os.fork()
            if first == 0:
                os._exit(kit.child(command.line(place)).code)
            time.sleep(0.05 * (number // 2))
            second = kit.child(command.line(place))
            code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
            codes = sorted((code, second.code))
            late = codes == [0, 0] and command.name == "calibrate"  # the second found all done
            won += codes[0] == 0
            told += codes == [0, 2] or late
            said = second.code == 0 or second.said.startswith("error: ")
            if kit.content(place) != whole or not said or not (codes == [0, 2] or late):
                wrong.append(f"{command.name} {codes}: {second.said[-300:]}")
    for text in wrong:
        print(f"     WRONG {text}")
    return [
        at_least("together: pairs of processes of which one won", won, races, "pairs"),
        at_least("together: the other was told", told, races, "pairs"),
        at_most("together: outputs unlike that of one alone", len(wrong), 0, "pairs"),
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve(sys.argv[1], float(sys.argv[2]))
