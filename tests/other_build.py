"""A pytest plugin: run the tests on another build of the native kernels (`make sanitize`).

    BITMOSAIC_CPU_MODULE=build/sanitize/_cpu.so python -m pytest -p other_build tests/kernels

The build named is imported here, before bitmosaic can import its own.
"""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location(
    "bitmosaic.backends._cpu", os.environ["BITMOSAIC_CPU_MODULE"]
)
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
