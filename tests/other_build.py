"""A pytest plugin: run the tests on another build of the compiled modules.

For `make sanitize` and `make emulate`:

    BITMOSAIC_BUILD=build/sanitize python -m pytest -p other_build tests/kernels

The modules of that directory are imported here, before bitmosaic can import its own.
"""

import importlib.util
import os
import sys
from pathlib import Path

for name in ("bitmosaic.backends._cpu", "bitmosaic._kmeans", "bitmosaic.rounding._scales"):
    (path,) = Path(os.environ["BITMOSAIC_BUILD"]).glob(f"{name.rpartition('.')[2]}.*so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
