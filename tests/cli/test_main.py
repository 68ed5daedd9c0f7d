from __future__ import annotations

import subprocess
import sys

import pytest


def tilewise(*arguments):
    """Run the command as people do, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tilewise", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_lists_the_commands():
    done = tilewise("--help")
    assert done.returncode == 0
    commands = (
        "compare bench train generate explain doctor kernels tune learn trace masks reproduce"
    )
    for command in commands.split():
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "--no-such-option"], "No such option"),
        (["no-such-command"], "No such command"),
        (["explain", "--shape", "1,2"], "shape: got '1,2'"),
        (["compare", "--lengths", "few"], "--lengths"),
    ],
)
def test_bad_input_ends_with_status_2_and_a_message(arguments, message):
    done = tilewise(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_loads_no_command():
    code = (
        "import sys, tilewise.cli as cli\n"
        "sys.argv = ['tilewise', '--help']\n"
        "try:\n    cli.main()\n"
        "except SystemExit:\n    pass\n"
        "print('matplotlib' in sys.modules, 'tilewise.bench.providers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False False"
