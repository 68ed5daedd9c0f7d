"""Characters as tokens."""

import pytest
import torch

from tilewise.training import Corpus, Vocabulary, load_corpus
from tilewise.training.data import standard_library_text

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


def corpus(text=TEXT, val_fraction=0.25, context=16):
    return Corpus.of(text, source="a text", val_fraction=val_fraction, context=context)


def test_vocabulary_round_trip():
    text = "bca\n\tÄ漢😀 \ud800"
    vocabulary = Vocabulary.of(text)
    assert vocabulary.characters == "".join(sorted(text))
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert sorted(tokens.tolist()) == list(range(len(text)))
    assert vocabulary.decode(tokens) == text
    assert vocabulary.encode("").tolist() == []


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"outside the vocabulary of 3: '\\n', 'é'$"):
        Vocabulary("abc").encode("abé\ncé")
    many = "".join(chr(1000 + i) for i in range(30))
    with pytest.raises(ValueError, match="and 10 more"):
        Vocabulary("abc").encode(many)


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_bad_vocabulary(characters):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(characters)


def test_split_by_position():
    made = corpus("ab" * 50 + "c" * 50)
    whole = torch.cat((made.train, made.val))
    assert made.vocabulary.decode(whole) == "ab" * 50 + "c" * 50
    assert len(made.val) == 37
    assert made.vocabulary.decode(made.val) == "c" * 37


def test_batches_are_pieces_of_the_training_part():
    made = corpus()
    batch = made.batch(50, 16, torch.Generator().manual_seed(0))
    assert batch.shape == (50, 17)
    train = made.vocabulary.decode(made.train)
    assert all(made.vocabulary.decode(row) in train for row in batch)
    assert torch.equal(batch, made.batch(50, 16, torch.Generator().manual_seed(0)))
    assert not torch.equal(batch, made.batch(50, 16, torch.Generator().manual_seed(1)))


def test_batches_reach_the_first_and_the_last_character():
    made = corpus("abcdefgh" * 10, context=4)
    made = Corpus("t", "", made.vocabulary, torch.arange(7), made.val)
    seen = made.batch(200, 4, torch.Generator().manual_seed(0)).unique()
    assert seen.tolist() == list(range(7))


def test_windows_span_their_part():
    made = corpus()
    windows = made.windows("val", 5, 16)
    assert windows.shape == (5, 17)
    assert torch.equal(windows[0], made.val[:17])
    assert torch.equal(windows[-1], made.val[-17:])


@pytest.mark.parametrize("length, part", [(30, "validation"), (20, "training")])
def test_too_short(length, part):
    fraction = 0.25 if part == "validation" else 0.9
    with pytest.raises(ValueError, match=f"a text is too short: its {length} .* for {part}, and"):
        corpus("x" * length, val_fraction=fraction)


def test_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("é" * 1000, encoding="utf-8")
    options = {"val_fraction": 0.5, "context": 4}
    made = load_corpus(path, max_chars=10_000, **options)
    assert len(made.train) + len(made.val) == 1000
    assert made.source == str(path)
    cut = load_corpus(path, max_chars=100, **options)
    assert len(cut.train) + len(cut.val) == 100
    assert cut.digest != made.digest


def test_cut_inside_a_character(tmp_path):
    """Whatever byte the reading stops at, the text is whole."""
    for lead in range(4):
        path = tmp_path / f"{lead}.txt"
        text = "a" * lead + "漢" * 400
        path.write_text(text, encoding="utf-8")
        made = load_corpus(path, max_chars=100, val_fraction=0.5, context=4)
        assert made.vocabulary.decode(torch.cat((made.train, made.val))) == text[:100]


def test_bad_file(tmp_path):
    options = {"max_chars": 100, "val_fraction": 0.5, "context": 4}
    with pytest.raises(FileNotFoundError, match=r"no data file .*missing\.txt"):
        load_corpus(tmp_path / "missing.txt", **options)
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(ValueError, match="binary is not UTF-8 text"):
        load_corpus(path, **options)


def test_standard_library_is_sorted_ascii_source_without_tests(tmp_path, monkeypatch):
    files = {
        "b.py": "b",
        "a.py": "a",
        "note.txt": "text",
        "umlaut.py": "ä",
        "pkg/z.py": "z",
        "pkg/tests/t.py": "t",
        "test/t.py": "t",
        "site-packages/s.py": "s",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert standard_library_text(100) == "a\nb\nz"
    assert standard_library_text(2) == "a\n"


def test_no_standard_library(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no standard library source"):
        standard_library_text(100)


def test_standard_library_of_this_python():
    made = load_corpus(max_chars=50_000, val_fraction=0.1, context=64)
    assert len(made.train) + len(made.val) == 50_000
    assert made.vocabulary.characters.isascii()
    assert "import " in made.vocabulary.decode(made.train)
