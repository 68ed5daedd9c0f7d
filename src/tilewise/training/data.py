"""Characters as tokens: the text, its vocabulary, the split and the batches."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


class Vocabulary:
    """The distinct characters of a text, in code point order; a token is an index into them."""

    def __init__(self, characters: str) -> None:
        if not characters:
            raise ValueError("a vocabulary needs at least one character")
        if list(characters) != sorted(set(characters)):
            raise ValueError("the characters of a vocabulary must be distinct and sorted")
        self.characters = characters
        self._codes = _codes(characters)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """``[len(text)]`` int64.

        Raises:
            ValueError: names the characters that the vocabulary does not have.
        """
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            named = ", ".join(repr(character) for character in unknown[:20])
            more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            raise ValueError(
                f"text has characters outside the vocabulary of {len(self)}: {named}{more}"
            )
        return torch.searchsorted(self._codes, _codes(text))

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[token] for token in tokens.tolist())


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, split by position: ``train`` and ``val`` are int64 vectors."""

    source: str
    digest: str
    vocabulary: Vocabulary
    train: Tensor
    val: Tensor

    @classmethod
    def of(cls, text: str, *, source: str, val_fraction: float, context: int) -> Corpus:
        """Split ``text``; each part must hold at least one sequence and its next character."""
        val_length = int(len(text) * val_fraction)
        for part, length in (("training", len(text) - val_length), ("validation", val_length)):
            if length < context + 1:
                raise ValueError(
                    f"{source} is too short: its {len(text):,} characters leave {length:,} for "
                    f"{part}, and context {context} needs at least {context + 1}; "
                    "give more text or a smaller context"
                )
        vocabulary = Vocabulary.of(text)
        tokens = vocabulary.encode(text)
        train, val = tokens.split((len(text) - val_length, val_length))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(source, digest, vocabulary, train, val)

    def batch(self, batch: int, context: int, generator: torch.Generator) -> Tensor:
        """Random training sequences with their next token: ``[batch, context + 1]``."""
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        return self.train[starts[:, None] + torch.arange(context + 1)]

    def windows(self, part: str, count: int, context: int) -> Tensor:
        """``count`` evenly spaced sequences of "train" or "val": ``[count, context + 1]``."""
        tokens = self.train if part == "train" else self.val
        starts = torch.linspace(0, len(tokens) - context - 1, count).long()
        return tokens[starts[:, None] + torch.arange(context + 1)]


def load_corpus(
    data: str | os.PathLike[str] | None = None,
    *,
    max_chars: int,
    val_fraction: float,
    context: int,
) -> Corpus:
    """The text of a file, or of the running Python's standard library when ``data`` is None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text, or too short.
    """
    if data is None:
        text, source = standard_library_text(max_chars), "the Python standard library"
    else:
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"no data file {path}")
        try:
            # Four bytes a character at most, and one more lest the cut fall inside the last one.
            with path.open("rb") as file:
                raw = file.read(4 * max_chars + 4)
            whole = len(raw) < 4 * max_chars + 4
            text = (raw if whole else _cut(raw)).decode("utf-8")[:max_chars]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from error
        source = str(path)
    return Corpus.of(text, source=source, val_fraction=val_fraction, context=context)


def standard_library_text(max_chars: int) -> str:
    """Source files of the running Python's standard library, joined in the order of their paths.

    Tests and installed packages are left out, and so are files with other than ASCII characters,
    which keeps the vocabulary to about a hundred.
    """
    pieces: list[str] = []
    length = 0
    for path in _source_files(Path(sysconfig.get_path("stdlib"))):
        try:
            text = path.read_text(encoding="ascii")
        except (UnicodeDecodeError, PermissionError):
            continue
        pieces.append(text)
        length += len(text) + 1
        if length > max_chars:
            break
    if not pieces:
        raise ValueError("this Python has no standard library source; give a text file")
    return "\n".join(pieces)[:max_chars]


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _cut(raw: bytes) -> bytes:
    """Without the last, perhaps incomplete, character."""
    end = len(raw) - 1
    while end > 0 and raw[end] & 0xC0 == 0x80:
        end -= 1
    return raw[:end]


def _codes(text: str) -> Tensor:
    """The code points of ``text``, ``[len(text)]`` int32."""
    raw = bytearray(text.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(raw, dtype=torch.int32) if raw else torch.empty(0, dtype=torch.int32)
