"""Register bitmosaic's checkpoints with transformers as soon as transformers is imported.

transformers finds no plug-ins by itself: without a registration it would load a bitmosaic
checkpoint with *random weights* and only a warning. So the wheel carries `bitmosaic.pth`, which
Python runs at every start of the interpreter and which calls `start` here. That puts a small object
on `sys.meta_path`; once transformers' quantizers and its model loader have been imported, it
imports `bitmosaic.integrations.transformers`, and takes itself off again.

This module lies beside the package, not in it, so that the start of an interpreter never imports
bitmosaic (and with it torch). `BITMOSAIC_NO_AUTOLOAD=1` switches the start-up part off; `import
bitmosaic` calls `install` in any case.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["install", "start"]

PLUGIN = "bitmosaic.integrations.transformers"
# The plug-in subclasses names of the first and needs the second whole. `modeling_utils` imports
# `quantizers`, so only the outermost of the two that is being imported may call the plug-in.
WATCHED = ("transformers.quantizers", "transformers.modeling_utils")


class _Watcher:
    """A finder that finds nothing itself, but learns when a watched module has been executed."""

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec that the other finders give, its loader calling back after execution."""
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                self._call_back(spec)
                return spec
        return None

    def _call_back(self, spec: "ModuleSpec") -> None:
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: "ModuleType") -> None:
            # On the loader's instance, not its class: nothing else sees the difference.
            del loader.exec_module
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0:
                self.finish()

        loader.exec_module = exec_module

    def finish(self) -> None:
        """Leave `sys.meta_path` and import the plug-in."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _import_plugin()


def _import_plugin() -> None:
    import importlib

    try:
        importlib.import_module(PLUGIN)
    except Exception as error:
        # A broken bitmosaic must not take transformers down with it, but nobody may load one of our
        # checkpoints unwarned.
        import logging

        logging.getLogger("bitmosaic").warning(
            "bitmosaic could not register with transformers, so its checkpoints must not be loaded "
            "in this process. The cause: %s: %s",
            type(error).__name__,
            error,
        )


def install() -> None:
    """Register with transformers now where it is loaded already, else when it will be."""
    modules = [sys.modules.get(name) for name in WATCHED]
    if all(_is_executed(module) for module in modules):
        _import_plugin()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _is_executed(module: "ModuleType | None") -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def start() -> None:
    """Install at the start of the interpreter, unless `BITMOSAIC_NO_AUTOLOAD` is set."""
    try:
        if os.environ.get("BITMOSAIC_NO_AUTOLOAD", "0") in ("", "0"):
            install()
    except Exception:
        # The one place where an error may vanish: this runs in every Python program of the
        # environment, of which almost none uses bitmosaic.
        return
