"""A Hugging Face causal language model opened for streaming: one decoder block in memory."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from bitmosaic.devices import CPU
from bitmosaic.model.experts import linears, normalise
from bitmosaic.model.skeleton import (
    build_skeleton,
    check_size,
    find_blocks,
    read_config,
    resolve,
)
from bitmosaic.model.tensor_files import TensorFiles

logger = logging.getLogger(__name__)


_DIGEST_CHUNK = 1 << 22

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Recipe:
    """How one model tensor, or several that one converter yields, come from checkpoint tensors."""

    target: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, pattern)


class Source:
    """A checkpoint directory (or hub id) of a causal language model; holds no weights.

    Everything that can be wrong with the directory is found here, before any work: not a model,
    another kind of model, missing, truncated or corrupted files, missing tensors, wrong shapes.
    Weights are read block by block on request, and are checked to be finite as they are read.

    Attributes:
        device: Where blocks are loaded and worked on.
    """

    def __init__(self, path_or_id: str | Path, device: torch.device = CPU) -> None:
        self.path, self.device = resolve(path_or_id), device
        self.config = read_config(self.path)
        self.files = TensorFiles(self.path)
        check_size(self.config, self.path, len(self.files.entries), self.files.largest_side)
        self.skeleton = build_skeleton(self.config, self.path)
        self.block_names = find_blocks(self.skeleton, self.path)
        recipes = _plan(self.skeleton, self.files)
        self._tied_away = _check_complete(self.skeleton, recipes, self.files, self.path)
        self._block_recipes, self._rest_recipes = _split(recipes, self.block_names)

    @cached_property
    def digest(self) -> str:
        """The sha256 over name, size and content of config.json and of every tensor file."""
        digest = hashlib.sha256()
        for path in (self.path / "config.json", *self.files.paths):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_DIGEST_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def _linear_shapes(self) -> dict[str, tuple[int, int]]:
        shapes: dict[str, tuple[int, int]] = {}
        for index, prefix in enumerate(self.block_names):
            block = self.empty_block(index)
            for name, linear in linears(block).items():
                shapes[f"{prefix}.{name}"] = (linear.out_features, linear.in_features)
        return shapes

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return every quantizable matrix by dotted path as (out, in), without reading weights."""
        return dict(self._linear_shapes)

    def empty_block(self, index: int) -> nn.Module:
        """Return one normalised decoder block with its parameters on meta; reads nothing."""
        block = self._copy_block(index)
        normalise(block)
        return block

    def load_block(
        self,
        index: int,
        dtype: torch.dtype | None = torch.float32,
        *,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Return one decoder block with its weights, normalised to `nn.Linear`, in eval mode.

        `dtype` None keeps the types of the file, `device` None is that of the source.  Only the
        tensors of this block are read.
        """
        block = self._copy_block(index)
        prefix = f"{self.block_names[index]}."
        for name, tensor in self._convert(self._block_recipes[index], dtype):
            _set_tensor(block, name.removeprefix(prefix), tensor)
        normalise(block)
        return _placed(block.requires_grad_(False).eval(), device or self.device)

    def load_rest(
        self,
        dtype: torch.dtype | None = torch.float32,
        *,
        tokens: Tensor | None = None,
        logits_of: Tensor | None = None,
        device: torch.device = CPU,
    ) -> PreTrainedModel:
        """Return the model with all weights outside the blocks; the blocks stay on meta.

        Tied weights are one parameter.  The module is a fresh copy, the caller's to change.

        Tables over the vocabulary are most of it, and can be read in part: with `tokens` only their
        entries of the input embedding, for a model that is asked for no others; with `logits_of`
        only these rows of the output head, which then gives these logits alone.  A tied table is
        whole unless both are given; one of an unusual kind always is.
        """
        model = copy.deepcopy(self.skeleton)
        tables, tied = self._tables
        wanted = {
            path: rows.unique() if path == self._embedding else rows
            for path, rows in ((self._embedding, tokens), (self._head, logits_of))
            if path in tables and rows is not None
        }
        if tied and len(wanted) < 2:
            wanted = {}
        in_part = {tables[path] for path in wanted}
        for recipe in self._rest_recipes:
            if recipe.sources[0][0] not in in_part:
                for name, tensor in self._convert([recipe], dtype):
                    _set_tensor(model, name, tensor)
        model.tie_weights(missing_keys=set(self._tied_away), recompute_mapping=False)
        for path, rows in wanted.items():
            weight = self.files.read(tables[path], dtype, rows)
            _set_table(model.get_submodule(path), rows.to(device), weight)
        return _placed(model.requires_grad_(False).eval(), device)

    @property
    def _embedding(self) -> str | None:
        return self._path_of(self.skeleton.get_input_embeddings())

    @property
    def _head(self) -> str | None:
        return self._path_of(self.skeleton.get_output_embeddings())

    def _path_of(self, wanted: nn.Module | None) -> str | None:
        return next((p for p, m in self.skeleton.named_modules() if m is wanted), None)

    @cached_property
    def _tables(self) -> tuple[dict[str, str], bool]:
        """Name in the file of each table that can be read in part, by module; are they tied?"""
        stored = {
            recipe.target: recipe.sources[0][0]
            for recipe in self._rest_recipes
            if recipe.converter is None
        }
        paths = [
            path
            for path in (self._embedding, self._head)
            if path is not None and _is_plain_table(self.skeleton.get_submodule(path))
        ]
        found = {path: stored[f"{path}.weight"] for path in paths if f"{path}.weight" in stored}
        tied = f"{self._head}.weight" in self.skeleton.all_tied_weights_keys
        if not tied:
            return found, False
        if len(found) != 1 or len(paths) < 2:  # stored twice, whether or not they are equal
            return {}, True
        return dict.fromkeys(paths, *found.values()), True

    def rest_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor as in the file) for all outside the blocks, tied ones once."""
        for recipe in self._rest_recipes:
            for name, tensor in self._convert([recipe], None):
                if name not in self._tied_twice:
                    yield name, tensor

    def block_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the model, tensor as in the file) of one block, after normalisation."""
        block = self.load_block(index, None, device=CPU)
        for name, tensor in block.state_dict().items():
            yield f"{self.block_names[index]}.{name}", tensor

    def block_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Return the file's type of each tensor of a block, before normalisation; reads nothing."""
        return {recipe.target: self._dtype(recipe) for recipe in self._block_recipes[index]}

    def rest_entries(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return (name, type, shape) of what `rest_tensors` yields, without reading it."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        return [
            (recipe.target, self._dtype(recipe), shapes[recipe.target])
            for recipe in self._rest_recipes
            if recipe.target not in self._tied_twice
        ]

    def _dtype(self, recipe: Recipe) -> torch.dtype:
        return self.files.entries[recipe.sources[0][0]].dtype

    @cached_property
    def _tied_twice(self) -> frozenset[str]:
        """Tied tensors that are stored beside their equal; differing ones are not tied at all."""
        stored = {recipe.target for recipe in self._rest_recipes}
        pairs = {
            name: origin
            for name, origin in self.skeleton.all_tied_weights_keys.items()
            if name in stored and origin in stored
        }
        if not pairs:
            return frozenset()
        rest = self.load_rest(None)
        return frozenset(
            name
            for name, origin in pairs.items()
            if rest.get_parameter(name) is rest.get_parameter(origin)
        )

    def _copy_block(self, index: int) -> nn.Module:
        block = self.skeleton.get_submodule(self.block_names[index])
        # The configuration is shared, not copied: it holds the choice of attention function.
        configs = [module.config for module in block.modules() if hasattr(module, "config")]
        return copy.deepcopy(block, {id(config): config for config in configs})

    def _convert(
        self, recipes: list[Recipe], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        for recipe in recipes:
            yield from _follow(self.skeleton, recipe, self.files.read, dtype)


def _placed(module: Module, device: torch.device) -> Module:
    """Bring what a module holds to a device; what it holds no weights of stays on meta."""
    if device.type != "cpu":
        module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    return module


def _plan(model: PreTrainedModel, files: TensorFiles) -> list[Recipe]:
    """Map checkpoint names to model names as transformers' own loader does, without reading."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    unused: list[str] = []
    for name in sorted(files.entries, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in expected:
            unused.append(name)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        recipe = recipes.setdefault(target, Recipe(target, converter))
        if converter is None and recipe.sources:
            raise ValueError(
                f"{files.entries[name].path}: {target} must be stored once, but both "
                f"{recipe.sources[0][0]!r} and {name!r} give it. Save the checkpoint again."
            )
        recipe.sources.append((name, pattern or name))
    if unused:  # masks and rotary frequencies of old checkpoints; never what the model needs
        logger.info("%d tensors have no place in the model, the first: %s", len(unused), unused[0])
    return list(recipes.values())


def _check_complete(
    model: PreTrainedModel, recipes: list[Recipe], files: TensorFiles, path: Path
) -> frozenset[str]:
    """Refuse a checkpoint that does not fill the model; return the names that tying fills."""
    expected = model.state_dict()
    produced: dict[str, tuple[int, ...]] = {}
    for recipe in recipes:
        produced |= _shapes(model, recipe, files)
    for name, shape in produced.items():
        _check_shape(name, shape, expected[name])
    missing = set(expected).difference(produced)
    tied_away: set[str] = set()
    for name, origin in model.all_tied_weights_keys.items():
        if name in missing and origin in expected and origin not in missing:
            tied_away.add(name)
        elif origin in missing and name not in missing:
            tied_away.add(origin)
    missing -= tied_away
    if missing:
        first = min(missing, key=dot_natural_key)
        raise ValueError(
            f"{path}: the checkpoint must hold every tensor of {type(model).__name__}, but "
            f"{len(missing)} are missing, the first being {first}. Give a complete checkpoint."
        )
    return frozenset(tied_away)


def _shapes(
    model: PreTrainedModel, recipe: Recipe, files: TensorFiles
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a recipe yields, by following it on tensors without storage."""

    def empty(name: str, dtype: torch.dtype | None) -> Tensor:
        return torch.empty(files.entries[name].shape, device="meta", dtype=dtype)

    try:
        return {name: tuple(tensor.shape) for name, tensor in _follow(model, recipe, empty, None)}
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{recipe.target}: the stored tensors must fit together, but the {len(recipe.sources)} "
            f"from {recipe.sources[0][0]!r} on do not. Give a complete checkpoint."
        ) from error


def _follow(
    model: PreTrainedModel,
    recipe: Recipe,
    read: Callable[[str, torch.dtype | None], Tensor],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the model tensors of one recipe."""
    if recipe.converter is None:
        yield recipe.target, read(recipe.sources[0][0], dtype)
        return
    converter = copy.deepcopy(recipe.converter)
    for name, pattern in recipe.sources:
        # Nothing else refers to the parts: the converter frees them as it merges them.
        converter.add_tensor(recipe.target, name, pattern, read(name, dtype))
    converted = converter.convert(recipe.target, model=model, config=model.config)
    for target, value in converted.items():
        yield target, value[0] if isinstance(value, list) else value


def _split(
    recipes: list[Recipe], block_names: tuple[str, ...]
) -> tuple[list[list[Recipe]], list[Recipe]]:
    """Sort recipes by the block that they fill."""
    blocks: list[list[Recipe]] = [[] for _ in block_names]
    rest: list[Recipe] = []
    prefix = block_names[0].rpartition(".")[0] + "."
    for recipe in recipes:
        if recipe.target.startswith(prefix):
            blocks[int(recipe.target.removeprefix(prefix).split(".")[0])].append(recipe)
        else:
            rest.append(recipe)
    return blocks, rest


def _check_shape(name: str, found: tuple[int, ...], expected: Tensor) -> None:
    if tuple(found) != tuple(expected.shape):
        raise ValueError(
            f"{name}: the stored tensor must have the shape {list(expected.shape)} that "
            f"config.json implies, not {list(found)}. Give the weights that belong to it."
        )


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of the same shape."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    _check_shape(name, tuple(tensor.shape), getattr(owner, leaf))
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _is_plain_table(module: nn.Module) -> bool:
    """Whether a module is an embedding, or a head without anything else over the vocabulary."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and module.bias is None


def _set_table(module: nn.Module, rows: Tensor, weight: Tensor) -> None:
    """Give an embedding or a head some rows of its table; tokens find theirs by themselves."""
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # of gradients alone, and checked against the table's length
        module.register_forward_pre_hook(lambda _, given: (torch.searchsorted(rows, given[0]),))
