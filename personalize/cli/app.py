"""The group of all commands, and how a command ends: its exit code, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from ..errors import PersonalizeError
from ..version import __version__
from . import adapters, checkpoints
from .dataset import dataset
from .generate import generate
from .merge import merge
from .messages import print_error, warnings_as_lines
from .train import batch, report, train

HELP = ("-h", "--help")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 2 after an expected error, 130 after Ctrl-C."""
    with warnings_as_lines():
        try:
            return cli.main(list(arguments), prog_name="personalize", standalone_mode=False) or 0
        except PersonalizeError as error:
            return print_error(str(error))
        except click.ClickException as error:
            return print_error(error.format_message())
        except click.Abort:
            click.echo("stopped", err=True)
            return 130


class Commands(click.Group):
    """Commands that each have their own -h: click adds its automatic one only in the first context that asks for it."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(click.help_option(*HELP)(cmd), name)


@click.group(cls=Commands, context_settings={"help_option_names": HELP, "max_content_width": 120}, invoke_without_command=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """From a handful of pictures to a portable adapter.

    \b
      personalize train photos/rex --class dog
      personalize generate "a rex dog in the snow" --adapter runs/rex/rex.safetensors
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@click.command()
def version() -> int:
    """Print the versions of everything that matters, for a bug report."""
    import platform
    from importlib.metadata import version as installed

    click.echo(f"personalize {__version__}\npython {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "diffusers", "transformers", "peft", "safetensors"):
        click.echo(f"{name} {installed(name)}")
    return 0


for command in (train, batch, generate, dataset, report, version, merge, *adapters.COMMANDS, *checkpoints.COMMANDS):
    cli.add_command(command)
