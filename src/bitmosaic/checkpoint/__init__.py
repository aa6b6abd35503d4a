"""Files of ours: safetensors, and the packed checkpoint directory (docs/format-spec.md).

The only package that writes safetensors.  Everything is written to a temporary name, fsynced and
renamed; everything read is validated before a kernel sees it.
"""

from bitmosaic.checkpoint.directory import (
    FORMAT_VERSION,
    QUANT_METHOD,
    PackedCheckpoint,
    check_description,
    open_packed,
)
from bitmosaic.checkpoint.files import (
    Entry,
    atomic_file,
    header,
    read_entries,
    read_json,
    read_tensors,
    stream_tensors,
    sync_directory,
    tensor_files,
    write_tensors,
    write_text,
)
from bitmosaic.checkpoint.packed import (
    OUTLIER_ARRAYS,
    assemble,
    check_optional,
    describe,
    description,
    original_shape,
    validate,
)

__all__ = [
    "FORMAT_VERSION",
    "OUTLIER_ARRAYS",
    "QUANT_METHOD",
    "Entry",
    "PackedCheckpoint",
    "assemble",
    "atomic_file",
    "check_description",
    "check_optional",
    "describe",
    "description",
    "header",
    "open_packed",
    "original_shape",
    "read_entries",
    "read_json",
    "read_tensors",
    "stream_tensors",
    "sync_directory",
    "tensor_files",
    "validate",
    "write_tensors",
    "write_text",
]
