"""Reading text from wherever it is, and cutting it into token windows.

The windows follow the protocol of GPTQ (Frantar et al., 2022, arXiv 2210.17323): documents are
joined, tokenized once with the tokenizer's own special tokens, cut into windows of equal length
without overlap, and the tail is dropped. Two other ways are here because some models need them:
`bos_each` starts every document with the BOS token (the corpus rule of the embedded model), and
`document_sequences` scores each document by itself (story models).
"""

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Tokenizer",
    "document_sequences",
    "read_text",
    "stdlib_documents",
    "stdlib_windows",
    "text_digest",
    "token_windows",
]

# A module of the standard library is left out when a part of its path has one of these names.
STDLIB_EXCLUDED = frozenset(
    ("site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings")
)
STDLIB_SPLITS = {"train": "train", "heldout": "heldout", "test": "heldout", "validation": "heldout"}
DATASET_SPLITS = ("train", "test", "validation")
STRUCTURED = (".jsonl", ".ndjson", ".json", ".parquet")


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    bos_token_id: int | None

    def __call__(self, text: str, **options: Any) -> Any:
        """Return an encoding with `input_ids`."""
        ...


def read_text(source: str | Path, split: str = "test") -> list[str]:
    """Return the documents of a text source.

    Args:
        source: A text file (one document), a `.jsonl`, `.json` or `.parquet` file (records with the
            key "text"), a directory of such files, a `datasets` id as "name[:config][:split]", or
            "stdlib", "stdlib:train", "stdlib:heldout": the standard library of the running Python.
        split: The split of a `datasets` id or of "stdlib" where the source names none.

    Raises:
        FileNotFoundError: The source looks like a path and is not there.
        ValueError: The source has no text, or is not text.
    """
    name = str(source)
    if not name.strip():
        raise ValueError("text source must be a name, not empty. Give a file or a directory.")
    if name.split(":")[0] == "stdlib" and not Path(name).exists():
        documents = stdlib_documents(name.partition(":")[2] or split)
    elif Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if _is_visible(path, Path(source)))
        documents = [document for path in files for document in _read_file(path)]
    elif Path(source).is_file():
        documents = _read_file(Path(source))
    elif _looks_like_path(name):
        raise FileNotFoundError(
            f"text source {name!r} must be an existing file or directory. Check the path, or name "
            'a datasets id ("name:config:split") or "stdlib".'
        )
    else:
        documents = _read_dataset(name, split)
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"text source {name!r} must contain text, not be empty. Name another one.")
    return documents


def token_windows(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    seqlen: int,
    *,
    join: str = "\n\n",
    limit: int | None = None,
    bos_each: bool = False,
    name: str = "the text",
) -> Tensor:
    """Cut documents into windows of `seqlen` tokens without overlap, dropping the tail.

    Args:
        tokenizer: A tokenizer of transformers.
        documents: The texts.
        seqlen: Tokens of a window, at least 2.
        join: What stands between two documents before they are tokenized as one text.
        limit: Keep at most this many windows.
        bos_each: Tokenize each document by itself, put the BOS token before it, and concatenate;
            `join` is then unused.
        name: How an error names the text.

    Returns:
        int64 tensor [windows, seqlen].

    Raises:
        ValueError: The text is shorter than one window.
    """
    _check_length("seqlen", seqlen)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, not {limit}. Leave it out for all.")
    if bos_each:
        bos = _bos(tokenizer)
        parts = ([bos, *_encode(tokenizer, text, special=False)] for text in documents)
        tokens = [token for part in parts for token in part]
    else:
        tokens = _encode(tokenizer, join.join(documents), special=True)
    windows = len(tokens) // seqlen
    if windows == 0:
        raise ValueError(
            f"{name} must have at least {seqlen} tokens (one window), not {len(tokens)}. "
            "Give a longer text or a smaller seqlen."
        )
    windows = min(windows, limit or windows)
    return torch.tensor(tokens[: windows * seqlen], dtype=torch.int64).view(windows, seqlen)


def document_sequences(
    tokenizer: Tokenizer,
    documents: Sequence[str],
    seqlen: int,
    *,
    limit: int | None = None,
    name: str = "the text",
) -> list[Tensor]:
    """Return one sequence for each document: BOS and its first `seqlen − 1` tokens.

    Every token of the document that is kept is predicted, the first one from BOS alone. `limit` is
    the number of documents to keep.
    """
    _check_length("seqlen", seqlen)
    bos = _bos(tokenizer)
    sequences = []
    for document in documents[:limit]:
        tokens = _encode(tokenizer, document, special=False)[: seqlen - 1]
        if tokens:
            sequences.append(torch.tensor([bos, *tokens], dtype=torch.int64))
    if not sequences:
        raise ValueError(f"{name} must have at least 1 token, not 0. Give a longer text.")
    return sequences


def stdlib_documents(split: str) -> list[str]:
    """Return the modules of the running Python's standard library in sorted order.

    A module is held out when the first byte of the SHA-256 of its path relative to the standard
    library (POSIX form) is divisible by 16; all others are "train". So the split is the same on
    every machine and the held-out modules of any Python were never trained on.
    """
    if split not in STDLIB_SPLITS:
        raise ValueError(
            f'split of the standard library must be "train" or "heldout", not {split!r}. '
            'Write "stdlib:train" or "stdlib:heldout".'
        )
    heldout = STDLIB_SPLITS[split] == "heldout"
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [
        (root / name).read_text(encoding="utf-8", errors="replace")
        for name in names
        if not STDLIB_EXCLUDED.intersection(name.split("/")) and _is_heldout(name) == heldout
    ]


def stdlib_windows(
    tokenizer: Tokenizer, split: str, seqlen: int, *, limit: int | None = None
) -> Tensor:
    """Return windows [windows, seqlen] of the standard library, BOS before each module."""
    return token_windows(
        tokenizer,
        stdlib_documents(split),
        seqlen,
        limit=limit,
        bos_each=True,
        name=f"the standard library's {split} modules",
    )


def text_digest(documents: Iterable[str]) -> str:
    """Return the SHA-256 of the documents, their boundaries included."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _is_heldout(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 16 == 0


def _check_length(name: str, value: int) -> None:
    if value < 2:
        raise ValueError(f"{name} must be at least 2 tokens, not {value}. Give a larger one.")


def _bos(tokenizer: Tokenizer) -> int:
    bos = tokenizer.bos_token_id
    if bos is None:
        raise ValueError(
            "the tokenizer must have a BOS token to start each document with, not None. "
            "Use windows over the joined text."
        )
    return bos


def _encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    # verbose=False: a whole text is longer than any context, and that is no reason to warn.
    encoding = tokenizer(text, add_special_tokens=special, verbose=False)
    tokens: list[int] = encoding["input_ids"]
    return tokens


def _is_visible(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden


def _looks_like_path(name: str) -> bool:
    # A datasets id has at most one slash and no file suffix of ours.
    suffixes = (*STRUCTURED, ".txt", ".md", ".py", ".raw", ".tokens", ".gz", ".zip")
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(suffixes)


def _read_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} must be UTF-8, not other bytes (offset {error.start}). "
            "Convert it, or leave it out of the directory."
        ) from error
    if suffix in (".jsonl", ".ndjson"):
        return list(_json_lines(content, path))
    if suffix == ".json":
        return list(_records(_parse_json(content, f"{str(path)!r}"), path))
    return [content]


def _json_lines(content: str, path: Path) -> Iterator[str]:
    # Not splitlines: a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield from _records(_parse_json(line, f"line {number} of {str(path)!r}"), path)


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be JSON, not broken ({error}). Repair the file.") from error


def _records(value: Any, path: Path) -> Iterator[str]:
    """Yield the texts of a string, of a record with the key "text", or of a list of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _records(item, path)
    elif isinstance(value, dict) and isinstance(value.get("text"), str | list):
        yield from _records(value["text"], path)
    else:
        raise ValueError(
            f'records of {str(path)!r} must be strings or have the key "text", '
            f"not {_shorten(value)}. Rename the key."
        )


def _shorten(value: Any) -> str:
    shown = repr(sorted(value)) if isinstance(value, dict) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _read_parquet(path: Path) -> list[str]:
    import pyarrow.parquet as parquet  # lazy: only parquet files need it

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if "text" not in names:
        raise ValueError(
            f'columns of {str(path)!r} must include "text", not only {names}. Rename one.'
        )
    column = file.read(columns=["text"]).column("text")
    return [text for text in column.to_pylist() if text is not None]


def _read_dataset(name: str, default_split: str) -> list[str]:
    # A colon inside brackets belongs to the slice of a split: "name:train[:1%]".
    identifier, *options = re.split(r":(?![^\[]*\])", name)
    if len(options) > 2:
        raise ValueError(
            f"text source {name!r} must be a path or name[:config][:split], not {len(options) + 1} "
            "parts. Leave some out."
        )
    split = default_split
    if options and options[-1].split("[")[0] in DATASET_SPLITS:
        split = options.pop()
    elif len(options) == 2:
        split = options.pop()
    config = options[0] if options else None

    import datasets  # lazy: slow to import, and only hub texts need it

    try:
        records = datasets.load_dataset(identifier, config, split=split)
    except Exception as error:
        # datasets raises a dozen types for "not there", "no network" and "no such split".
        raise ValueError(
            f"text source {name!r} must be a file, a directory or a readable dataset, which it is "
            f"not ({type(error).__name__}: {error}). Give a local text file instead."
        ) from error
    if "text" not in records.column_names:
        raise ValueError(
            f'columns of dataset {name!r} must include "text", not only {records.column_names}. '
            "Save its text as .jsonl first."
        )
    return [str(text) for text in records["text"]]
