"""``tilewise train`` and ``tilewise generate`` through their entry point."""

import json
import subprocess
import sys

import pytest

from tilewise.cli import main
from tilewise.training import TrainConfig, load_checkpoint

TEXT = "def f(x):\n    return x + 1\n\n" * 60
TINY = ["--context", "16", "--layers", "1", "--heads", "2", "--dim", "16", "--batch", "4"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tilewise", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_train_resume_and_generate(run, text_file, tmp_path):
    out = tmp_path / "run"
    code, table, _ = run("train", "--data", text_file, "--out", out, "--steps", 5, *TINY)
    assert code == 0
    for part in ("tilewise", "tokens/s", str(out / "loss.png"), str(out / "log.json")):
        assert part in table.replace("\n", "")
    assert load_checkpoint(out).step == 5

    code, printed, _ = run("train", "--out", out, "--resume", "--steps", 7, "--json")
    assert code == 0
    (row,) = json.loads(printed)["rows"]
    assert row["steps"] == 7
    assert row["val_loss"] < row["first_loss"]
    assert load_checkpoint(out).step == 7
    assert len(json.loads((out / "log.json").read_text())["steps"]) == 7

    code, text, notes = run("generate", out, "--prompt", "def ", "--tokens", 20, "--seed", 1)
    assert code == 0
    assert text.startswith("def ")
    assert len(text) == 4 + 20 + 1
    assert "20 tokens," in notes
    assert "tokens/s" in notes

    code, printed, _ = run("generate", out, "--tokens", 20, "--seed", 1, "--json")
    (row,) = json.loads(printed)["rows"]
    assert row["prompt"] + row["text"] + "\n" == text
    assert row["tokens"] == 20


def test_options_reach_the_run(run, text_file, tmp_path):
    options = "--kv-heads 1 --lr 0.01 --dropout 0.1 --attention sdpa --dtype bfloat16 --seed 3"
    more = ["--max-chars", "1000", "--device", "cpu", "--steps", "2"]
    run("train", "--data", text_file, "--out", tmp_path, *TINY, *options.split(), *more)
    assert load_checkpoint(tmp_path).config == TrainConfig(
        data=str(text_file),
        context=16,
        layers=1,
        heads=2,
        dim=16,
        batch=4,
        kv_heads=1,
        lr=0.01,
        dropout=0.1,
        attention="sdpa",
        dtype="bfloat16",
        seed=3,
        max_chars=1000,
        steps=2,
    )


def test_help_shows_the_defaults(run):
    _, text, _ = run("train", "--help")
    for name in ("steps", "batch", "context", "layers", "heads", "dim", "lr", "attention"):
        (line,) = [row for row in text.splitlines() if f" --{name} " in row]
        assert f"({getattr(TrainConfig, name)})" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--context", 200], "leave 168 for validation, and context 200 needs at least 201"),
        (["--attention", "fast"], "attention must be one of standard, sdpa, tilewise, got 'fast'"),
        (["--backend", "fast"], "fast"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16"),
        (["--dim", 15], "dim must be a multiple of heads"),
        (["--steps", 0], "steps must be positive"),
        (["--data", "nowhere.txt"], "no data file nowhere.txt"),
        (["--resume"], "no checkpoint in"),
    ],
)
def test_train_errors(run, text_file, tmp_path, arguments, message):
    base = ["--data", text_file, "--steps", 2, *TINY]
    code, out, err = run("train", *base, "--out", tmp_path / "run", *arguments)
    assert (code, out) == (2, "")
    assert err.lstrip().startswith("tilewise: ")
    assert message in err


def test_resume_refuses_another_model(run, text_file, tmp_path):
    run("train", "--data", text_file, "--out", tmp_path, "--steps", 2, *TINY)
    code, _, err = run("train", "--out", tmp_path, "--resume", "--steps", 3, "--dim", 32)
    assert code == 2
    assert "dim 32 differs from the 16 of the run to resume" in err


def test_interrupt(run, text_file, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tilewise.training.train", interrupted)
    code, out, err = run("train", "--data", text_file, "--out", tmp_path, *TINY)
    assert (code, out) == (130, "")
    assert "--resume" in err


def test_generate_errors(run, text_file, tmp_path):
    code, _, err = run("generate", tmp_path / "nowhere")
    assert code == 2
    assert "no checkpoint in" in err
    run("train", "--data", text_file, "--out", tmp_path, "--steps", 1, *TINY)
    code, out, err = run("generate", tmp_path, "--prompt", "Quick ß")
    assert (code, out) == (2, "")
    assert "'Q'" in err
    assert "'ß'" in err


def test_as_a_module(text_file, tmp_path):
    command = [sys.executable, "-m", "tilewise", "train", "--data", text_file, "--out", tmp_path]
    done = subprocess.run(
        [*command, "--steps", "2", *TINY, "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["rows"][0]["steps"] == 2
