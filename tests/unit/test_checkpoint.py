import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bitmosaic import checkpoint
from bitmosaic.checkpoint import Entry, header, open_packed, read_entries, read_tensors
from bitmosaic.checkpoint.packed import _NOT_FINITE
from bitmosaic.formats import SCALE_DTYPES
from bitmosaic.tensor import ARRAYS
from strategies import packed_tensors, write_packed

DTYPES = tuple(checkpoint.files._DTYPE_NAMES)


def tensors_of_every_type():
    made = {
        str(dtype): torch.arange(7).to(dtype) if dtype != torch.bool else torch.arange(7) % 2 == 0
        for dtype in DTYPES
    }
    return made | {
        "empty": torch.empty(0, dtype=torch.float32),
        "empty matrix": torch.empty((3, 0), dtype=torch.float16),
        "number": torch.tensor(1.5),
        "matrix": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),  # not contiguous
        'naïve "名前"': torch.ones(2, 2),
    }


class TestFile:
    def test_safetensors_reads_every_type_back(self, tmp_path):
        tensors = tensors_of_every_type()
        path = tmp_path / "a.safetensors"
        checkpoint.write_tensors(path, tensors, {"b": "2", "a": "1"})
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(tensors)
            assert file.metadata() == {"a": "1", "b": "2"}
            for name, tensor in tensors.items():
                found = file.get_tensor(name)
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found, tensor)
        again, metadata = read_tensors(path)
        assert metadata == {"a": "1", "b": "2"}
        assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

    def test_the_header_tells_the_exact_size_before_a_byte_is_written(self, tmp_path):
        tensors = tensors_of_every_type()
        path = tmp_path / "a.safetensors"
        checkpoint.write_tensors(path, tensors, {"key": "value"})
        entries = [Entry(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
        head, ordered = header(entries, {"key": "value"})
        data = path.read_bytes()
        assert data.startswith(head)
        assert len(data) == len(head) + sum(entry.nbytes for entry in ordered)
        assert len(head) % 8 == 0
        assert int.from_bytes(head[:8], "little") == len(head) - 8

    def test_every_tensor_is_aligned_to_its_type(self):
        entries = [Entry(f"{i}{dtype}", dtype, (i,)) for dtype in DTYPES for i in (1, 3)]
        head, ordered = header(entries, {})
        offset = len(head)
        for entry in ordered:
            assert offset % entry.dtype.itemsize == 0
            offset += entry.nbytes

    def test_the_same_tensors_give_the_same_bytes_in_any_order(self, tmp_path):
        tensors = tensors_of_every_type()
        checkpoint.write_tensors(tmp_path / "a", tensors, {"x": "1", "y": "2"})
        backwards = dict(reversed(tensors.items()))
        checkpoint.write_tensors(tmp_path / "b", backwards, {"y": "2", "x": "1"})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_headers_are_read_without_data(self, tmp_path):
        tensors = tensors_of_every_type()
        path = tmp_path / "a.safetensors"
        checkpoint.write_tensors(path, tensors)
        found = read_entries(path)
        assert {name: (e.dtype, e.shape) for name, e in found.items()} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    def test_no_tensor_at_all(self, tmp_path):
        checkpoint.write_tensors(tmp_path / "a.safetensors", {}, {"only": "metadata"})
        assert read_tensors(tmp_path / "a.safetensors") == ({}, {"only": "metadata"})


class Full:
    """A file on a disk with room for some bytes only."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class TestAtomic:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "a.txt"
        checkpoint.write_text(path, "old")

        def fail():
            with checkpoint.atomic_file(path) as file:
                file.write(b"new, but")
                raise RuntimeError("half way")

        with pytest.raises(RuntimeError, match="half way"):
            fail()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_the_name_appears_only_when_complete(self, tmp_path):
        path = tmp_path / "deep" / "a.txt"
        with checkpoint.atomic_file(path) as file:
            file.write(b"some")
            assert not path.exists()
        assert path.read_bytes() == b"some"

    @pytest.mark.parametrize("room", [0, 700, 5000])
    def test_a_full_disk_leaves_nothing_behind(self, tmp_path, monkeypatch, room):
        path = tmp_path / "a.safetensors"
        checkpoint.write_text(path, "old")
        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda self, mode: Full(opened(self, mode), room))
        tensors = {str(index): torch.zeros(1000) for index in range(3)}
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            checkpoint.write_tensors(path, tensors)
        monkeypatch.undo()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_disk_found_full_while_flushing_leaves_nothing_behind(self, tmp_path, monkeypatch):
        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            checkpoint.write_text(tmp_path / "a.txt", "new")
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_process_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a.txt"
        checkpoint.write_text(path, "old")
        program = (
            "import os, sys; from pathlib import Path; from bitmosaic import checkpoint\n"
            "with checkpoint.atomic_file(Path(sys.argv[1])) as file:\n"
            "    file.write(b'new'); file.flush(); os._exit(9)\n"
        )
        done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
        assert done.returncode == 9
        assert path.read_text() == "old"
        checkpoint.write_text(path, "newer")
        assert path.read_text() == "newer"

    def test_data_is_on_disk_before_its_name_is(self, tmp_path, monkeypatch):
        events = []
        fsync, replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), fsync(handle)))
        monkeypatch.setattr(
            Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))
        )
        checkpoint.write_text(tmp_path / "a.txt", "text")
        assert events == ["sync", "rename", "sync"]


class TestPacked:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_a_directory_gives_back_its_tensors(self, tmp_path, shards):
        tensors = write_packed(tmp_path, shards=shards)
        packed = open_packed(tmp_path)
        assert set(packed.tensors) == set(tensors)
        assert list(packed.plain()) == ["norm.weight"]
        for name, tensor in tensors.items():
            again = packed.load(name)
            assert again.arrays().keys() == tensor.arrays().keys()
            for key, array in tensor.arrays().items():
                assert torch.equal(again.arrays()[key], array), (name, key)
            assert torch.equal(again.dequantize(), tensor.dequantize())

    def test_described_and_assembled_is_the_same_tensor(self):
        for name, tensor in packed_tensors().items():
            described = checkpoint.describe(tensor)
            assert checkpoint.describe(checkpoint.assemble(name, described, tensor.arrays())) == (
                described
            )

    def test_the_sample_uses_every_array_of_the_built_in_formats(self):
        used = {key for tensor in packed_tensors().values() for key in tensor.arrays()}
        assert used == set(ARRAYS) - {"grids"}


@pytest.mark.parametrize("kind", sorted(SCALE_DTYPES))
def test_every_bit_pattern_that_is_no_number_is_known(kind: str) -> None:
    number, mask = _NOT_FINITE[kind]
    dtype = SCALE_DTYPES[kind]
    if dtype.itemsize == 4:  # every exponent and sign, with a few mantissas each
        high = torch.arange(1 << 16) << 16
        bits = torch.cat([high + low for low in (0, 1, 0x8000, 0xFFFF)]).to(torch.uint32)
    else:
        bits = torch.arange(1 << 8 * dtype.itemsize)
        bits = bits.to(torch.uint16 if dtype.itemsize == 2 else torch.uint8)
    values = bits.view(dtype).to(torch.float32)
    found = bits.view(torch.uint8).numpy().view(number) & mask == mask
    assert (torch.from_numpy(found) == ~values.isfinite()).all()
    assert found.any()
