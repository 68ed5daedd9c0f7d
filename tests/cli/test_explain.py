from __future__ import annotations

import json
import sys

import pytest
import torch

import tilewise
from tilewise import cli
from tilewise.dispatch import BACKENDS


@pytest.fixture
def explain(monkeypatch, capsys):
    """Run the command; its standard output, error and exit status."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tilewise", "explain", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return captured.out, captured.err, end.value.code

    return run


def test_it_prints_what_the_library_explains(explain):
    q, k = torch.empty(2, 8, 1024, 64), torch.empty(2, 2, 1024, 64)
    expected = tilewise.explain(q, k, k, mask=tilewise.masks.causal())
    text, _, status = explain("--shape", "2,8,1024,64", "--kv-heads", "2", "--mask", "causal")
    assert status == 0
    assert text.strip() == str(expected)
    for backend in BACKENDS:
        assert backend in text


def test_json_holds_the_same(explain):
    text, _, status = explain(
        *("--shape", "2,8,64,32", "--kv-heads", "2", "--kv-len", "96", "--v-dim", "16"),
        *("--dtype", "bf16", "--mask", "window:8&documents:2", "--dropout", "0.25"),
        *("--softcap", "5", "--bias", "--alibi", "--relative-bias", "--sinks", "--grad", "--json"),
    )
    assert status == 0
    found = json.loads(text)
    assert found["backend"] == found["plan"]["backend"]
    assert found["reasons"][found["backend"]] == []
    assert set(found["reasons"]) == set(BACKENDS)
    problem = found["problem"]
    sizes = {"batch": 2, "q_heads": 8, "kv_heads": 2, "q_len": 64, "kv_len": 96}
    assert {key: problem[key] for key in sizes} == sizes
    assert (problem["head_dim"], problem["v_dim"]) == (32, 16)
    assert (problem["dtype"], problem["dropout_p"]) == ("torch.bfloat16", 0.25)
    for option in ("bias", "alibi", "relative_bias", "sinks", "needs_grad"):
        assert problem[option] is True
    assert problem["softcap"] == 5
    assert sum(found["tiles"].values()) > 0


def test_a_backend_can_be_asked_for(explain):
    text, _, _ = explain("--shape", "1,1,16,8", "--backend", "reference", "--json")
    assert json.loads(text)["backend"] == "reference"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "1,2,x,4"], "shape"),
        (["--shape", "1,4,16,8", "--kv-heads", "3"], "kv_heads"),
        (["--shape", "1,4,16,8", "--mask", "triangle"], "mask"),
        (["--shape", "1,4,16,8", "--dtype", "int8"], "dtype"),
        (["--shape", "1,4,16,8", "--dropout", "1.5"], "dropout_p"),
        (["--shape", "1,4,16,8", "--backend", "abacus"], "backend"),
        (["--shape", "1,4,16,8", "--device", "abacus"], "device"),
    ],
)
def test_bad_input_is_named(explain, arguments, message):
    text, error, status = explain(*arguments)
    assert status == 2
    assert error.startswith("tilewise: " + message)
    assert text == ""
