"""The ``tilewise`` command: one file per subcommand, each a thin caller of the library."""

from __future__ import annotations

import typer

from .bench import bench
from .compare import compare
from .doctor import doctor
from .explain import explain
from .generate import generate
from .kernels import kernels
from .learn import learn
from .masks import masks
from .reproduce import reproduce
from .trace import trace
from .train import train
from .tune import tune

app = typer.Typer(
    name="tilewise",
    help="FlashAttention for any device, any mask, any derivative.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (
    compare,
    bench,
    train,
    generate,
    explain,
    doctor,
    kernels,
    learn,
    trace,
    masks,
    reproduce,
    tune,
):
    app.command()(_command)


def main() -> None:
    """Entry point; bad input ends with one line on standard error and exit status 2."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError) as error:
        typer.secho(f"tilewise: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from error
