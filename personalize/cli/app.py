"""The group of all commands, and how a command ends: its exit code, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from ..errors import PersonalizeError, RecipeError
from ..version import __version__
from . import adapters, checkpoints
from .caption import caption
from .dataset import dataset
from .generate import generate
from .group import HELP, Commands, json_option
from .imports import import_only_what_is_used
from .jobs import jobs
from .merge import merge
from .messages import answer, answer_in_json, echo, print_error, show_in_any_code_page, warnings_as_lines
from .presets import presets
from .serve import serve, ui
from .train import batch, finish, report, tell, train


def main() -> None:
    """The console script."""
    prepare_process()
    sys.exit(run(sys.argv[1:]))


def prepare_process() -> None:
    """What a process of our own is given before anything heavy is imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch comes: threads that wait sleep, the core may be needed
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy comes: on thin matrices two take ten times as long as one
    show_in_any_code_page()
    import_only_what_is_used()


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 2 after an expected error, 130 after Ctrl-C.

    With --json, stdout is one line of JSON for a program, and what a person would read goes to stderr.
    """
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" not in options:
        return run_command(arguments)
    command = next((word for word in options if word in cli.commands), "")
    with answer_in_json(command) as (found, out):
        code = run_command(arguments)
    echo(found.line(code), file=out)
    return code


def run_command(arguments: Sequence[str]) -> int:
    """Run one command for a person, and return its exit code."""
    with warnings_as_lines():
        try:
            return cli.main(list(arguments), prog_name="personalize", standalone_mode=False) or 0
        except PersonalizeError as error:
            return print_error(error)
        except UnicodeEncodeError as error:  # Python's way to hold bytes of a command or of a file's name that are no text
            return print_error(RecipeError(f"{error.object!s} is no UTF-8 text", "rename the file, or write it in UTF-8"))
        except click.ClickException as error:
            return print_error(RecipeError(error.format_message()))
        except click.Abort:
            echo("stopped", err=True)
            return 130


@click.group(cls=Commands, context_settings={"help_option_names": HELP, "max_content_width": 120}, invoke_without_command=True)
@json_option
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """From a handful of pictures to a portable adapter.

    \b
      personalize train photos/rex --class dog
      personalize generate "a rex dog in the snow" --adapter runs/rex/rex.safetensors
    """
    if ctx.invoked_subcommand is None:
        echo(ctx.get_help())


@click.command()
def version() -> int:
    """Print the versions of everything that matters, for a bug report."""
    import platform
    from importlib.metadata import version as installed

    found = {"personalize": __version__, "python": platform.python_version()}
    found |= {name: installed(name) for name in ("torch", "diffusers", "transformers", "peft", "safetensors")}
    for name, number in found.items():
        echo(f"{name} {number}" + f" on {platform.platform()}" * (name == "python"))
    answer(versions=found, platform=platform.platform())
    return 0


COMMANDS = (train, batch, finish, tell, generate, dataset, caption, report, presets, version, merge, jobs, serve, ui)
for command in (*COMMANDS, *adapters.COMMANDS, *checkpoints.COMMANDS):
    cli.add_command(command)
