import re
import subprocess
import sys
from pathlib import Path

import bitmosaic

ROOT = Path(__file__).resolve().parents[2]


def test_the_python_example_runs_as_printed(tmp_path: Path) -> None:
    """Only the model's path is made absolute, so that nothing is written into the repository."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    model = Path(bitmosaic.__file__).parent / "data" / "stdlib-llama"
    shown = code[1].replace('"src/bitmosaic/data/stdlib-llama"', repr(str(model)))
    assert shown != code[1]
    done = subprocess.run(
        [sys.executable, "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bits, text = done.stdout.split("\n", 1)
    assert 0.998 * 2.75 < float(bits.split()[0]) <= 2.75
    assert text.strip().startswith("def main(")
    size = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    assert int(bits.split()[1]) == size
