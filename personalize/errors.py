"""Every error a user can meet, in one tree.

    PersonalizeError                 anything we say on purpose: one line, exit code 2
    ├── RecipeError                  an unknown or contradictory setting
    ├── DataError                    the folder of pictures, its captions or masks
    ├── BaseModelError               the base cannot be found, read or used
    ├── AdapterError                 an adapter file or an operation on adapters
    │   ├── HostileFileError         truncated, lying, pickled or otherwise not what it says
    │   ├── UnmatchedKeysError       keys that belong to no known module
    │   └── FamilyMismatchError      an adapter of another model family
    ├── OutputError                  a path that cannot be written, a full disk
    ├── TrainingError                the run itself went wrong (non-finite loss, ...)
    └── JobError                     a job that cannot do what was asked of it now
        └── NoSuchJobError           a job that there is not

Each message says what happened, where, and (in ``hint``) what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PersonalizeError(Exception):
    """What happened and where, with a hint of what to try. Shown as one line; the command exits with 2."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what, self.hint = what, hint

    def __str__(self) -> str:
        what = shorten(self.what)
        return f"{what} ({self.hint})" if self.hint else what


class RecipeError(PersonalizeError):
    """An unknown, malformed or contradictory setting."""


class DataError(PersonalizeError):
    """The folder of pictures, its captions or masks."""


class BaseModelError(PersonalizeError):
    """The base model cannot be found, read or used."""


class AdapterError(PersonalizeError):
    """An adapter file, or an operation on adapters."""


class HostileFileError(AdapterError):
    """A file that is truncated, lies about its contents, or is a pickle in disguise."""


class UnmatchedKeysError(AdapterError):
    """Keys of an adapter file that belong to no known module."""


class FamilyMismatchError(AdapterError):
    """An adapter made for another model family."""


class OutputError(PersonalizeError):
    """A path that cannot be written."""


class TrainingError(PersonalizeError):
    """The run itself went wrong."""


class JobError(PersonalizeError):
    """A job cannot do what was asked of it in the state that it is in."""


class NoSuchJobError(JobError):
    """There is no job of this id."""


def check_type(
    value: object, kinds: type | tuple[type, ...], what: str, wanted: str, error: type[PersonalizeError] = PersonalizeError
) -> None:
    """Raise an error that says what to pass, where a Python call got something of another type."""
    if not isinstance(value, kinds):
        raise error(f"{what} must be {wanted.partition(': ')[0]}, not {type(value).__name__}", wanted.partition(": ")[2])


def shorten(text: str, limit: int = 500) -> str:
    """A long text without its middle: how it begins and how it ends say most.

    >>> shorten("no layers called a, b, c, d, e, f, g, h in rex.safetensors", 40)
    'no layers called a, b, c … x.safetensors'
    """
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 3].rstrip()} … {text[-end:].lstrip()}"


def nearest(word: str, valid: Iterable[str]) -> str:
    """A hint that names the valid word nearest to a mistyped one.

    >>> nearest("rnak", ["rank", "alpha"])
    'did you mean rank?'
    """
    valid = sorted(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose from {', '.join(valid)}"
