"""Hostile packed checkpoints: structural mutations of sound ones, and what must come of them.

A mutation keeps most of a checkpoint as it was, so that it passes the first checks: a number in
config.json changes, an array gets another length or type with offsets that agree, a permutation
repeats an entry.  Everything is drawn from one `random.Random`, so a seed is a case.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitmosaic import backends, checkpoint
from bitmosaic.checkpoint import assemble, open_packed
from bitmosaic.tensor import ARRAYS, QuantizedTensor

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "X9", ""), 1),
}
INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257, 65535, 65536, 65537),
    *(2**24, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**36, 2**53, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64, 2**64 + 24, 10**30, -(2**31), -(2**63)),
)
NAMES = (
    *("int1", "int2-g16", "int3-g16", "int4", "int8-sym", "int4-g999999999", "int9", "int4-g0"),
    *("fp8-e4m3-g32", "fp8-e4m3-tensor", "bf16", "fp16", "nvfp4", "mxfp4", "pruned", "codebook3"),
    *("codebook8", "codebook9", "os", "base", "../int4", "int4\0", "int4-g" + "9" * 400, "", "__"),
)
OTHER = (None, True, False, 0.5, float("nan"), float("inf"), 1e400, "", "x", "\ud800", [], {}, [[]])


@dataclass
class Packed:
    """A checkpoint in parts: config.json, the header of its tensor file, and that file's data."""

    config: Any
    header: dict[str, Any]
    data: bytearray
    head_text: bytes | None = None
    """In place of the header, where bytes of it were changed."""
    length: int | None = None
    """In place of the header's length."""
    index: Any = None
    config_text: bytes | None = None
    changes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path) -> Packed:
        """Take a sound checkpoint of one file apart."""
        content = (directory / MODEL).read_bytes()
        size = int.from_bytes(content[:8], "little")
        config = json.loads((directory / "config.json").read_text())
        return cls(config, json.loads(content[8 : 8 + size]), bytearray(content[8 + size :]))

    def copy(self) -> Packed:
        """Return a copy that may be changed."""
        return Packed(copy.deepcopy(self.config), copy.deepcopy(self.header), bytearray(self.data))

    def write(self, directory: Path) -> None:
        """Write the files, whatever they say."""
        text = self.config_text
        if text is None:
            text = json.dumps(self.config).encode(errors="replace")
        (directory / "config.json").write_bytes(text)
        head = self.head_text
        if head is None:
            head = json.dumps(self.header).encode(errors="replace")
            head += b" " * (-len(head) % 8)
        length = len(head) if self.length is None else self.length
        (directory / MODEL).write_bytes(length.to_bytes(8, "little") + head + self.data)
        if self.index is None:
            (directory / INDEX).unlink(missing_ok=True)
        else:
            (directory / INDEX).write_text(json.dumps(self.index))

    @property
    def described(self) -> dict[str, Any]:
        """The table of packed weights in config.json, as far as there is one."""
        found = self.config
        for key in ("quantization_config", "tensors"):
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}

    def entries(self) -> list[str]:
        """Names in the header whose entry can be changed."""
        return [
            name
            for name, entry in self.header.items()
            if isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= entry.keys()
        ]


def any_value(dice: random.Random) -> Any:
    """Draw a value that may stand in JSON."""
    kind = dice.randrange(6)
    if kind < 3:
        return dice.choice(INTEGERS)
    if kind == 3:
        return dice.choice(OTHER)
    if kind == 4:
        return dice.choice(NAMES)
    return [any_value(dice) for _ in range(dice.randrange(4))]


def near(dice: random.Random, value: Any) -> Any:
    """Draw a value like the one that stands there."""
    if isinstance(value, bool) or not isinstance(value, (int, str, list, dict)):
        return any_value(dice)
    if isinstance(value, int):
        steps = (
            value + 1,
            value - 1,
            2 * value,
            value // 2,
            -value,
            value + 8,
            dice.choice(INTEGERS),
        )
        return dice.choice(steps)
    if isinstance(value, str):
        return dice.choice(NAMES)
    if isinstance(value, list):
        changed = list(value)
        kind = dice.randrange(5)
        if kind == 0 or not changed:
            changed.append(any_value(dice))
        elif kind == 1:
            changed.pop(dice.randrange(len(changed)))
        elif kind == 2:
            changed.reverse()
        elif kind == 3:
            changed *= dice.choice((2, 300))
        else:
            place = dice.randrange(len(changed))
            changed[place] = near(dice, changed[place])
        return changed
    return any_value(dice)


def change_node(dice: random.Random, root: dict[str, Any]) -> str:
    """Change, remove, rename or copy one node of a JSON object, wherever it lies."""
    node, path = root, []
    while True:
        if not node:
            return "nothing"
        key = dice.choice(list(node))
        path.append(key)
        if not isinstance(node[key], dict) or dice.random() < 0.25:
            break
        node = node[key]
    kind = dice.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[dice.choice((key + "x", "", "format_version", "..", "codes"))] = node.pop(key)
    elif kind == 2:
        node[key] = any_value(dice)
    elif kind == 3:
        node[key] = copy.deepcopy(node[dice.choice(list(node))])
    else:
        node[key] = near(dice, node[key])
    return f"{'.'.join(map(str, path))} ({kind})"


def change_description(dice: random.Random, packed: Packed) -> str:
    """Change what config.json says of one weight, to something that may well be valid."""
    table = packed.described
    if not table:
        return "nothing"
    name = dice.choice(list(table))
    found = table[name]
    if not isinstance(found, dict):
        return "nothing"
    key = dice.choice(("shape", "tile", "formats", "permutations", "outlier_format", "activations"))
    choices: dict[str, Callable[[], Any]] = {
        "shape": lambda: [dice.choice(INTEGERS[:26]), dice.choice(INTEGERS[:26])],
        "tile": lambda: [dice.choice(INTEGERS[:26]), dice.choice(INTEGERS[:26])],
        "formats": lambda: [dice.choice(NAMES) for _ in range(dice.choice((1, 1, 2, 3, 5, 256)))],
        "permutations": lambda: dice.choice((["in"], ["out"], ["in", "out"], ["out", "in"])),
        "outlier_format": lambda: dice.choice(("fp16", "bf16", "fp32", "int8", "fp8")),
        "activations": lambda: dice.choice(
            (["nvfp4"], ["fp8-e4m3-tensor"], ["nvfp4", "fp8-e4m3-tensor"])
        ),
    }
    if dice.random() < 0.3:
        found[key] = near(dice, found.get(key))
    elif dice.random() < 0.1:
        found.pop(key, None)
    else:
        found[key] = choices[key]()
    return f"{name}.{key} described"


def resize(dice: random.Random, packed: Packed) -> str:
    """Give an array another length or type; its bytes and all offsets agree."""
    names = packed.entries()
    if not names:
        return "nothing"
    name = dice.choice(names)
    entry = packed.header[name]
    if not sound_offsets(entry, len(packed.data)):
        return "nothing"
    first, last = entry["data_offsets"]
    dtype = dice.choice((entry["dtype"], *SIZES)) if dice.random() < 0.4 else entry["dtype"]
    item = SIZES.get(dtype, 1)
    bytes_now = last - first
    wanted = dice.choice(
        (bytes_now, bytes_now, 0, bytes_now + item, bytes_now - item, 2 * bytes_now, 8)
    )
    count = max(0, min(wanted, 1 << 16)) // item
    content = packed.data[first:last][: count * item]
    content += bytes(count * item - len(content))
    packed.data[first:last] = content
    moved = count * item - bytes_now
    for other in packed.entries():
        offsets = packed.header[other]["data_offsets"]
        if other != name and sound_offsets(packed.header[other], 1 << 40) and offsets[0] >= last:
            packed.header[other]["data_offsets"] = [offsets[0] + moved, offsets[1] + moved]
    shape = [count] if dice.random() < 0.9 else [1, count]
    packed.header[name] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [first, first + count * item],
    }
    return f"{name} as {dtype} {shape}"


def sound_offsets(entry: Any, limit: int) -> bool:
    """Tell whether an entry's offsets are two whole numbers in order."""
    offsets = entry.get("data_offsets")
    return (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(each) is int for each in offsets)
        and 0 <= offsets[0] <= offsets[1] <= limit
    )


def damage_data(dice: random.Random, packed: Packed) -> str:
    """Change bytes of one array."""
    names = [
        each for each in packed.entries() if sound_offsets(packed.header[each], len(packed.data))
    ]
    if not names:
        return "nothing"
    name = dice.choice(names)
    first, last = packed.header[name]["data_offsets"]
    if first == last:
        return "nothing"
    kind = dice.randrange(4)
    if kind == 0:
        packed.data[first:last] = bytes([dice.choice((0, 255, 127, 128))]) * (last - first)
    elif kind == 1:
        packed.data[first:last] = dice.randbytes(last - first)
    else:
        for _ in range(dice.choice((1, 1, 2, 8))):
            packed.data[dice.randrange(first, last)] ^= 1 << dice.randrange(8)
    return f"bytes of {name} ({kind})"


def damage_text(dice: random.Random, packed: Packed) -> str:
    """Change bytes of the header, its length, config.json's bytes, or the end of the file."""
    kind = dice.randrange(6)
    head = json.dumps(packed.header).encode(errors="replace")
    if kind == 0:
        packed.length = dice.choice(
            (0, 1, 8, len(head) - 1, len(head) + 8, 2**31, 2**63, 2**64 - 1)
        )
    elif kind == 1:
        changed = bytearray(head)
        for _ in range(dice.choice((1, 2, 8))):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        packed.head_text = bytes(changed)
    elif kind == 2:
        text = bytearray(json.dumps(packed.config).encode(errors="replace"))
        for _ in range(dice.choice((1, 2, 8))):
            text[dice.randrange(len(text))] = dice.randrange(256)
        packed.config_text = bytes(text)
    elif kind == 3:
        del packed.data[dice.randrange(len(packed.data) + 1) :]
    elif kind == 4:
        packed.data += bytes(dice.choice((1, 8, 4096)))
    else:
        deep = dice.choice((b"[" * 50_000, b'{"a":' * 50_000, b"1" * 5000, b"\xff\xfe", b""))
        packed.config_text = deep
    return f"text ({kind})"


def change_index(dice: random.Random, packed: Packed) -> str:
    """Put an index beside the file."""
    names = ("../outside.safetensors", "/etc/passwd", "..", ".", "", MODEL, "config.json", 7, None)
    chosen = {name: dice.choice((MODEL, MODEL, *names)) for name in packed.entries()}
    packed.index = {"metadata": {}, "weight_map": chosen}
    if dice.random() < 0.5:
        change_node(dice, packed.index)
    return "index"


def mutate(dice: random.Random, packed: Packed) -> Packed:
    """Return a copy with one to four changes, of which `changes` tells."""
    changed = packed.copy()
    ways: tuple[tuple[int, Callable[[random.Random, Packed], str]], ...] = (
        (6, change_description),
        (4, resize),
        (4, damage_data),
        (2, lambda dice, each: change_node(dice, each.header)),
        (3, lambda dice, each: change_node(dice, each.config)),
        (1, damage_text),
        (1, change_index),
    )
    weights = [weight for weight, _ in ways]
    for _ in range(dice.choice((1, 1, 2, 3, 4))):
        (chosen,) = dice.choices(ways, weights)
        changed.changes.append(chosen[1](dice, changed))
    return changed


def mutate_model(dice: random.Random, packed: Packed) -> Packed:
    """Return a copy with changes, more often than not of what config.json says of the model."""
    if dice.random() < 0.4:
        return mutate(dice, packed)
    changed = packed.copy()
    kept = changed.config.pop("quantization_config", None)
    for _ in range(dice.choice((1, 1, 2))):
        changed.changes.append(change_node(dice, changed.config))
    if kept is not None:
        changed.config["quantization_config"] = kept
    return changed


def mutate_tensor(
    dice: random.Random, described: dict[str, Any], arrays: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return one weight's description and arrays with one to three changes, without any file."""
    packed = Packed(
        {"quantization_config": {"tensors": {"w": copy.deepcopy(described)}}}, {}, bytearray()
    )
    changed = {key: array.clone() for key, array in arrays.items()}
    for _ in range(dice.choice((1, 1, 2, 3))):
        kind = dice.randrange(5)
        if kind < 2:
            change_description(dice, packed)
            continue
        if kind == 2 and dice.random() < 0.3:
            change_node(dice, packed.described)
            continue
        if not changed:
            continue
        key = dice.choice(list(changed))
        changed_one = damaged_array(dice, changed[key])
        if changed_one is None:
            del changed[key]
        else:
            changed[dice.choice(ARRAYS) if dice.random() < 0.05 else key] = changed_one
    return packed.described.get("w"), changed


def damaged_array(dice: random.Random, array: torch.Tensor) -> torch.Tensor | None:
    """Return an array of other bytes, length, shape or type; None for none at all."""
    kind = dice.randrange(12)
    array = array.flatten()
    octets = array.contiguous().view(torch.uint8).clone()
    if kind < 6 and octets.numel():
        for _ in range(dice.choice((1, 1, 2, 8))):
            octets[dice.randrange(octets.numel())] ^= 1 << dice.randrange(8)
        return octets.view(array.dtype)
    if kind == 6:
        return torch.full_like(octets, dice.choice((0, 127, 128, 255))).view(array.dtype)
    if kind == 7:
        return array[: dice.randrange(array.numel() + 1)].clone()
    if kind == 8:
        return torch.cat([array, array[: dice.choice((1, 8))]])
    if kind == 9:
        return array[None]
    if kind == 10:
        return array.to(dice.choice((torch.int8, torch.int64, torch.float32, torch.bool)))
    return None


# What must come of it


def attempt(directory: Path, *, uses: bool = True) -> str:
    """Open a checkpoint, read and `uses` all of it; return "refused" or "read".

    Anything else than a sentence (ValueError, or OSError for a file) is raised.
    """
    try:
        packed = open_packed(directory)
        for path in packed.files.values():
            assert path.parent == directory, f"{path} lies outside"
        for name in packed.tensors:
            tensor = packed.load(name)
            if uses:
                use(tensor)
        for name in packed.plain():
            checkpoint.read_tensors(packed.files[name], [name])
    except (ValueError, OSError) as error:
        return _refused(error)
    return "read"


def attempt_tensor(described: Any, arrays: dict[str, torch.Tensor], *, uses: bool = True) -> str:
    """Assemble one weight, and `uses` it; return "refused" or "read"."""
    try:
        tensor = assemble("w", described, arrays)
        if uses:
            use(tensor)
    except ValueError as error:
        return _refused(error)
    return "read"


def _refused(error: Exception) -> str:
    if not str(error).strip():
        raise AssertionError("a refusal must be a sentence")
    return "refused"


def use(tensor: QuantizedTensor) -> None:
    """Decode a weight that was accepted and multiply by it, natively too, where it is small."""
    if tensor.shape[0] * tensor.shape[1] > 1 << 16:
        return
    weight = tensor.dequantize()
    assert weight.shape == tensor.shape
    for name in ("reference", "cpu"):
        backend = backends.get(name)
        if backend.objection(tensor, torch.device("cpu")) is None:
            y = backend.linear(torch.ones(2, tensor.shape[1]), backend.prepare(tensor))
            assert y.shape == (2, tensor.shape[0])
