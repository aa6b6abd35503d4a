"""What a checkpoint holds outside the matrices to be quantized, read from headers alone."""

from __future__ import annotations

import torch

from bitmosaic.checkpoint import Entry
from bitmosaic.model.experts import linears
from bitmosaic.model.source import Source


def plain_entries(source: Source) -> dict[str, Entry]:
    """List every tensor but the quantizable matrices: name, type in the file, shape.

    Tied tensors appear once, under the name that `Source.rest_tensors` yields.
    """
    found: dict[str, Entry] = {}
    for index, prefix in enumerate(source.block_names):
        block = source.empty_block(index)
        matrices = {f"{name}.weight" for name in linears(block)}
        dtypes = source.block_dtypes(index)
        for name, tensor in block.state_dict().items():
            if name not in matrices:
                full = f"{prefix}.{name}"
                dtype = _dtype_of(full, dtypes)
                found[full] = Entry(full, dtype, tuple(tensor.shape))
    for name, dtype, shape in source.rest_entries():
        found[name] = Entry(name, dtype, shape)
    return found


def embedding_modules(source: Source) -> tuple[str, str | None]:
    """Name the input embedding and the output head; None for a head tied to the embedding."""
    modules = {id(module): name for name, module in source.skeleton.named_modules()}
    embedding = source.skeleton.get_input_embeddings()
    head = source.skeleton.get_output_embeddings()
    stored = {name for name, _, _ in source.rest_entries()}
    name = modules[id(embedding)]
    head_name = None if head is None else modules[id(head)]
    if f"{name}.weight" not in stored and head_name is not None:
        name, head_name = head_name, None  # the tie is stored under the head's name
    if head_name is not None and f"{head_name}.weight" not in stored:
        head_name = None
    return name, head_name


def tensor_bytes(source: Source) -> int:
    """Bytes of the checkpoint's tensor files."""
    return sum(path.stat().st_size for path in source.files.paths)


def _dtype_of(name: str, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """Type of a tensor; a part of a fused module has the type of what it was cut from."""
    if name in dtypes:
        return dtypes[name]
    above = name
    while above:
        above = above.rpartition(".")[0]
        for other, dtype in dtypes.items():
            if above and other.startswith(f"{above}."):
                return dtype
    raise KeyError(name)
