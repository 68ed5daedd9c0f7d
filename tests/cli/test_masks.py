from __future__ import annotations

import json
import sys

import pytest

from tilewise import cli
from tilewise.learn import gallery


@pytest.fixture
def masks(monkeypatch, capsys, tmp_path):
    """Run the command in a folder of its own; its standard output, error and exit status."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tilewise", "masks", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


def test_it_draws_and_counts(masks, tmp_path):
    text, _, status = masks("--length", "128", "--block", "32", "--json", "--out", "a/masks.png")
    assert status == 0
    assert (tmp_path / "a" / "masks.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(text)
    assert found["picture"].endswith("masks.png")
    want = [
        {"mask": item.code, **item.counts, "visible": item.pairs}
        for item in gallery.entries(128, 32)
    ]
    assert found["rows"] == want
    assert want[0] == {"mask": "m.causal()", "skipped": 6, "partial": 4, "full": 6,
                       "visible": pytest.approx(129 / 256)}  # fmt: skip


def test_the_table_is_for_people(masks):
    text, _, status = masks("--length", "64", "--block", "16")
    assert status == 0
    assert "64 queries × 64 keys in tiles of 16 × 16" in text
    assert "m.causal()" in text and "skipped" in text and "masks.png" in text


def test_bad_input_is_named(masks, tmp_path):
    text, error, status = masks("--length", "5000")
    assert status == 2 and text == ""
    assert error.startswith("tilewise: length: got 5000, need 64 to 1024")
    assert not list(tmp_path.iterdir()), "nothing is written"
