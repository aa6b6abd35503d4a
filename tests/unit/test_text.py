"""bitmosaic.evaluation.text: sources, the rule of the standard library, windows."""

import json
import sysconfig

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitmosaic.evaluation import text as text_module
from bitmosaic.evaluation.text import (
    document_sequences,
    read_text,
    stdlib_documents,
    stdlib_windows,
    text_digest,
    token_windows,
)


class Letters:
    """A tokenizer of one token a character; as a special token it puts BOS (0) in front."""

    bos_token_id = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        tokens = [ord(character) for character in text]
        return {"input_ids": [0, *tokens] if add_special_tokens else tokens}


class WithoutBos(Letters):
    bos_token_id = None


def as_text(tokens):
    return "".join(chr(token) if token else "^" for token in tokens.flatten().tolist())


# Sources


def test_a_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert read_text(file) == ["one\ntwo\n"]


def test_json_lines_keep_separators_inside_strings(tmp_path):
    file = tmp_path / "a.jsonl"
    records = [{"text": "one\u2028two"}, {"text": ["three", "four"]}, "five"]
    lines = "\n\n".join(json.dumps(each, ensure_ascii=False) for each in records)
    file.write_text(lines, encoding="utf-8")
    assert read_text(file) == ["one\u2028two", "three", "four", "five"]


@pytest.mark.parametrize("value", [["a", {"text": "b"}], {"text": ["a", "b"], "other": 1}])
def test_json(tmp_path, value):
    (tmp_path / "a.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_text(tmp_path / "a.json") == ["a", "b"]


def test_parquet(tmp_path):
    table = pyarrow.table({"text": ["a", None, "b"], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_text(tmp_path / "a.parquet") == ["a", "b"]
    pyarrow.parquet.write_table(table.select(["id"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r'must include "text", not only \[\'id\'\]'):
        read_text(tmp_path / "b.parquet")


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name, content in [("b.txt", "3"), ("a/z.txt", "1"), (".git/x", "no"), ("a/.x", "no")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "a/zz.jsonl").write_text('{"text": "2"}\n')
    assert read_text(str(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must contain text, not be empty"),
        ("a.txt", b"ab\xff", r"must be UTF-8, not other bytes \(offset 2\)"),
        ("a.jsonl", b'"a"\n{', "line 2 of .* must be JSON"),
        ("a.jsonl", b'{"content": "a"}', r'have the key "text", not \[\'content\'\]'),
        ("a.json", b"[3]", 'have the key "text", not 3'),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "a/b/c", "missing.parquet"])
def test_a_missing_path_is_no_dataset(name):
    with pytest.raises(FileNotFoundError, match="must be an existing file or directory"):
        read_text(name)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "test")),
        ("owner/name:config", ("owner/name", "config", "test")),
        ("owner/name:train[:1%]", ("owner/name", None, "train[:1%]")),
        ("owner/name:config:validation", ("owner/name", "config", "validation")),
        ("owner/name:config:odd", ("owner/name", "config", "odd")),
    ],
)
def test_dataset_ids(monkeypatch, source, asked):
    seen = []

    def load_dataset(identifier, config, *, split):
        seen.append((identifier, config, split))
        return datasets.Dataset.from_dict({"text": ["a", "", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(source) == ["a", "b"]
    assert seen == [asked]


def test_a_dataset_that_cannot_be_read_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"readable dataset, which it is not .*no network"):
        read_text("owner/name")


# The standard library


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    for name in ["aifc.py", "a.py", "os.py", "re/_parser.py", *EXCLUDED]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)


EXCLUDED = ["test/a.py", "x/tests/a.py", "encodings/a.py", "lib2to3/a.py", "site-packages/a.py"]


def test_the_rule_of_the_standard_library(small_stdlib):
    # sha256 of "a.py" begins with f0, of "aifc.py" with 70, "os.py" d9, "re/_parser.py" 3d.
    assert stdlib_documents("heldout") == ["a.py", "aifc.py"]
    assert stdlib_documents("train") == ["os.py", "re/_parser.py"]
    assert read_text("stdlib:train") == stdlib_documents("train")
    assert read_text("stdlib") == stdlib_documents("test") == stdlib_documents("heldout")
    assert read_text("stdlib", split="train") == stdlib_documents("train")


def test_windows_of_the_standard_library_start_each_module_with_bos(small_stdlib):
    windows = stdlib_windows(Letters(), "train", 4)
    assert as_text(windows) == "^os.py^re/_parser.py"
    assert windows.shape == (5, 4)


def test_this_pythons_library_is_split_without_a_common_module():
    train, heldout = stdlib_documents("train"), stdlib_documents("heldout")
    assert len(train) > 10 * len(heldout) > 100
    assert not set(train) & {document for document in heldout if len(document) > 200}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='"train" or "heldout", not \'dev\''):
        read_text("stdlib:dev")


# Windows


@given(
    st.lists(st.text(st.characters(min_codepoint=1), max_size=9), min_size=1, max_size=5),
    st.integers(2, 6),
    st.none() | st.integers(1, 3),
)
def test_windows_cut_the_joined_text_once(documents, seqlen, limit):
    joined = [0, *map(ord, "\n\n".join(documents))]
    expected = [joined[i : i + seqlen] for i in range(0, len(joined) - seqlen + 1, seqlen)][:limit]
    if not expected:
        with pytest.raises(ValueError, match=f"at least {seqlen} tokens .* not {len(joined)}"):
            token_windows(Letters(), documents, seqlen, limit=limit)
    else:
        windows = token_windows(Letters(), documents, seqlen, limit=limit)
        assert windows.dtype == torch.int64
        assert windows.tolist() == expected


def test_too_short_a_text_is_named_with_both_counts():
    with pytest.raises(ValueError, match=r"book\.txt must have at least 8 tokens .*, not 4\."):
        token_windows(Letters(), ["abc"], 8, name="book.txt")


def test_each_document_may_be_a_sequence_of_its_own():
    sequences = document_sequences(Letters(), ["abcdef", "", "xy"], 4)
    assert [as_text(sequence) for sequence in sequences] == ["^abc", "^xy"]
    with pytest.raises(ValueError, match="must have a BOS token"):
        document_sequences(WithoutBos(), ["abc"], 4)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        document_sequences(Letters(), [""], 4)


@pytest.mark.parametrize("options", [{"seqlen": 1}, {"seqlen": 4, "limit": 0}])
def test_sizes_are_checked(options):
    with pytest.raises(ValueError, match="must be at least"):
        token_windows(Letters(), ["abcdefgh"], **options)


def test_the_digest_knows_boundaries():
    assert text_digest(["ab", "c"]) != text_digest(["a", "bc"])
    assert text_digest(["ab"]) == text_digest(iter(["ab"]))
    assert len(text_digest(["\ud800"])) == 64


def test_every_public_name_exists():
    assert all(hasattr(text_module, name) for name in text_module.__all__)
