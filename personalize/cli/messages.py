"""Errors and warnings as one line each on stderr."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

import click

from ..text import plain


def print_error(message: str) -> int:
    """Print an error; returns the exit code of a command that ends with it."""
    click.echo(f"personalize: {plain(message)}", err=True)
    return 2


def print_warning(message: str) -> None:
    """Print a warning."""
    click.echo(f"warning: {plain(message)}", err=True)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Our own Python warnings as one line each, without file and line number; those of libraries stay silent."""
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"personalize\b")
        warnings.showwarning = lambda message, *_, **__: print_warning(str(message))
        yield
