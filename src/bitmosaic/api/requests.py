"""From plain values to budgets and methods, with every mistake named before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from bitmosaic import methods
from bitmosaic.allocation import Allocation, Budget, parse_size
from bitmosaic.methods import Method
from bitmosaic.pipeline.calibrate import EVERY
from bitmosaic.pipeline.preflight import Limits

Announce = Callable[[str], None]
DEFAULT_METHOD = "sfmp"
_ALIASES = {"score": "score_by"}  # a method's `score` is its hook, so the field has another name
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def make_budget(
    bits: float | None,
    size: str | int | None,
    fp4: float | None = None,
    energy: float | None = None,
) -> Budget | None:
    """Read a budget; None where none is given, or one of energy, which has yet to become tiles."""
    given = {"bits": bits, "size": size, "fp4": fp4, "energy": energy}
    named = [f"{key} {value}" for key, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"budget must be one of bits, size, fp4 and energy, not {' and '.join(named)}. "
            "Drop all but one."
        )
    if fp4 is not None:
        return Budget(fp4=float(fp4))
    if bits is not None:
        return Budget(bits=float(bits))
    if size is not None:
        return Budget(size=size) if isinstance(size, int) else parse_size(size)
    return None


def make_limits(max_memory: str | int | None, announce: Announce | None = None) -> Limits:
    """Read a cap of resident memory: bytes, or text like 6GiB."""
    memory = None if max_memory is None else read_bytes("max_memory", max_memory)
    return Limits(memory, announce)


def read_bytes(thing: str, value: str | int) -> int:
    """Read a number of bytes, given as one or as text like 6GiB; `thing` is what errors name."""
    size = value if isinstance(value, int) else None
    if isinstance(value, str):
        try:
            size = parse_size(value).size
        except ValueError:
            size = None
    if size is None or size < 1:
        raise ValueError(
            f"{thing} must be a number with a unit like GiB, GB, MiB or MB, not {value!r}. "
            "Write it like 6GiB."
        )
    return size


def statistics_of(method: str | None, parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what a method asks for of the original model; without one what any method does."""
    if method is None:
        if parameters:
            raise ValueError(
                f"parameters must be of a method, not of none ({', '.join(parameters)}). "
                "Give --method."
            )
        return EVERY
    names = make_method(method, parameters).statistics
    if not names:
        raise ValueError(
            f"method must be one that asks for statistics of the original model, not {method!r}. "
            "It needs no `bitmosaic calibrate`."
        )
    return names


def choose_method(
    name: str | None, parameters: Mapping[str, Any], allocation: Allocation | None = None
) -> Method:
    """Build the method; one of an allocation made earlier starts from the parameters kept in it."""
    if allocation is None:
        return make_method(name or DEFAULT_METHOD, parameters)
    kept = allocation.recipe.get("method", name or DEFAULT_METHOD)
    if name is not None and name != kept:
        raise ValueError(
            f"method must be {kept}, which made the allocation, not {name!r}. Leave it out."
        )
    return make_method(kept, {**allocation.recipe.get("parameters", {}), **parameters})


def make_method(name: str, parameters: Mapping[str, Any]) -> Method:
    """Build a method from parameters by name, which may still be text."""
    kind = methods.get(name)
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    chosen: dict[str, Any] = {}
    for key, value in parameters.items():
        field = key if key in known else _ALIASES.get(key, key)
        if field not in known:
            raise ValueError(
                f"parameter of method {name} must be one of {', '.join(known)}, not {key!r}. "
                "Choose one of them, or another method."
            )
        chosen[field] = typed(f"{key} of method {name}", value, hints[field])
    return kind(**chosen)


def typed(thing: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type of a dataclass field: bool, int, float (or None), str, names."""
    readers = {
        bool: _read_bool,
        int: _read_int,
        float: _read_float,
        int | None: _read_optional_int,
        float | None: _read_optional,
        str: _read_str,
    }
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        int | None: "a whole number or none",
        float | None: "a number or none",
        str: "text",
    }
    reader = readers.get(hint, _read_names)
    try:
        return reader(value)
    except (ValueError, TypeError, KeyError) as error:
        wanted = words.get(hint, "names separated by commas")
        raise ValueError(f"{thing} must be {wanted}, not {value!r}. Correct it.") from error


def _read_bool(value: Any) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[value.lower()]


def _read_int(value: Any) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _read_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _read_optional(value: Any) -> float | None:
    return None if value is None or value == "none" else _read_float(value)


def _read_optional_int(value: Any) -> int | None:
    return None if value is None or value == "none" else _read_int(value)


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_names(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else list(value)
    names = tuple(_read_str(part).strip() for part in parts)
    if not all(names):
        raise ValueError
    return names
