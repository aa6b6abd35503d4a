"""What importing bitmosaic does and does not do, each asked of a fresh interpreter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PLUGIN = "bitmosaic.integrations.transformers"


def run(code, *, path=(), isolated=False, **environment):
    """Run code in a new interpreter (`isolated`: without the site-packages of this one)."""
    variables = {key: value for key, value in os.environ.items() if key != "BITMOSAIC_NO_AUTOLOAD"}
    variables |= {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    command = [sys.executable, *(["-S"] if isolated else []), "-c", code]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_importing_bitmosaic_imports_no_runtime():
    heavy = "{'transformers', 'triton', 'vllm', 'datasets'}"
    assert run(f"import bitmosaic, sys; print({heavy} & set(sys.modules))").stdout == "set()\n"


def test_the_start_of_an_interpreter_imports_only_the_hook():
    code = "import sys; print('bitmosaic_autoload' in sys.modules, 'bitmosaic' in sys.modules)"
    assert run(code).stdout == "True False\n"


@pytest.mark.parametrize(
    "order",
    [
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained",
        "import transformers.quantizers.auto",
    ],
)
def test_transformers_knows_us_without_an_import_of_ours(order):
    code = (
        f"{order}\n"
        "import sys, transformers.quantizers.auto as auto\n"
        f"print('bitmosaic' in auto.AUTO_QUANTIZER_MAPPING, {PLUGIN!r} in sys.modules)"
    )
    result = run(code)
    assert result.stdout == "True True\n"
    assert "could not register" not in result.stderr


def test_importing_bitmosaic_registers_where_the_start_did_not():
    code = (
        "import transformers.modeling_utils, transformers.quantizers.auto as auto\n"
        "assert 'bitmosaic' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "import bitmosaic\n"
        "print('bitmosaic' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    assert run(code, BITMOSAIC_NO_AUTOLOAD="1").stdout == "True\n"


# The hook by itself, with stand-ins for transformers and for the plug-in.


@pytest.fixture
def stage(tmp_path):
    """A site directory with the two installed files and small packages of the watched names."""
    for name in ("bitmosaic.pth", "bitmosaic_autoload.py"):
        shutil.copy(SOURCE / name, tmp_path)
    write(tmp_path, "bitmosaic/__init__.py", "")
    write(tmp_path, "bitmosaic/integrations/__init__.py", "")
    write(
        tmp_path,
        "bitmosaic/integrations/transformers.py",
        "from transformers.quantizers import Base\n"
        "from transformers.modeling_utils import Model\n"
        "print('registered')\n",
    )
    write(tmp_path, "transformers/__init__.py", "")
    write(tmp_path, "transformers/quantizers/__init__.py", "from .auto import Base\n")
    write(tmp_path, "transformers/quantizers/auto.py", "class Base: pass\n")
    write(
        tmp_path,
        "transformers/modeling_utils.py",
        "from .quantizers import Base\nclass Model: pass\nprint('loaded')\n",
    )
    return tmp_path


def write(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


def run_on(stage, code, **environment):
    """Run code where the stage is a site directory, its `.pth` executed."""
    return run(
        f"import site, sys; site.addsitedir({str(stage)!r})\n{code}", isolated=True, **environment
    )


@pytest.mark.parametrize(
    ("order", "printed"),
    [
        ("import transformers.modeling_utils", "loaded\nregistered\n"),
        ("import transformers.quantizers", "loaded\nregistered\n"),
        ("import transformers", ""),
        (
            "import transformers.quantizers, transformers.modeling_utils, bitmosaic_autoload as b\n"
            "print(len([f for f in sys.meta_path if isinstance(f, b._Watcher)]))",
            "loaded\nregistered\n0\n",
        ),
    ],
)
def test_the_plugin_is_imported_once_both_modules_are_whole(stage, order, printed):
    assert run_on(stage, order).stdout == printed


def test_the_loader_is_left_as_it_was(stage):
    code = (
        "import transformers.modeling_utils as m, inspect\n"
        "print('exec_module' in vars(m.__loader__), m.__spec__.loader is m.__loader__)\n"
        "print(inspect.getsource(m.Model).strip())"
    )
    assert run_on(stage, code).stdout.splitlines()[2:] == ["False True", "class Model: pass"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_the_switch(stage, value):
    code = "import transformers.modeling_utils; print(len(sys.meta_path))"
    switched = run_on(stage, code, BITMOSAIC_NO_AUTOLOAD=value)
    assert switched.stdout.startswith("loaded\n")
    assert "registered" not in switched.stdout
    assert "registered" in run_on(stage, code, BITMOSAIC_NO_AUTOLOAD="0").stdout


def test_installing_by_hand_does_not_mind_the_switch(stage):
    code = (
        "import bitmosaic_autoload as b; b.install(); b.install(); import transformers.quantizers"
    )
    assert run_on(stage, code, BITMOSAIC_NO_AUTOLOAD="1").stdout == "loaded\nregistered\n"


def test_a_broken_plugin_warns_and_leaves_transformers_alone(stage):
    write(stage, "bitmosaic/integrations/transformers.py", "raise RuntimeError('broken')")
    result = run_on(stage, "import transformers.modeling_utils as m; print(m.Model.__name__)")
    assert result.stdout == "loaded\nModel\n"
    assert "must not be loaded in this process. The cause: RuntimeError: broken" in result.stderr


def test_a_failing_import_of_transformers_stays_its_own(stage):
    write(stage, "transformers/modeling_utils.py", "raise ValueError('theirs')")
    code = (
        "try:\n    import transformers.modeling_utils\n"
        "except ValueError as error:\n    print(error)\n"
    )
    assert run_on(stage, code).stdout == "theirs\n"


def test_nothing_at_the_start_can_break_the_interpreter(stage):
    code = "import bitmosaic_autoload\nsys.meta_path = None\nprint(bitmosaic_autoload.start())\n"
    assert run_on(stage, code).stdout == "None\n"


def test_the_start_imports_nothing_else(stage):
    # What keeps each start of Python cheap; speed itself is not for a test.
    code = (
        "sys.modules.pop('bitmosaic_autoload', None)\n"
        "before = set(sys.modules)\n"
        "import bitmosaic_autoload; bitmosaic_autoload.start()\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    assert run_on(stage, code).stdout == "['bitmosaic_autoload']\n"
