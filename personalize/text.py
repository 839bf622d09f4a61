"""Texts and numbers as a person reads them, and commands as a shell does."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .errors import shorten

Shell = Literal["posix", "cmd", "powershell"]


def find_shell(system: str = os.name, environment: Mapping[str, str] = os.environ) -> Shell:
    """The shell that commands in messages are for. PowerShell alone puts its user's modules into PSModulePath.

    >>> find_shell("posix"), find_shell("nt", {"USERPROFILE": r"C:\\Users\\me", "PSModulePath": r"C:\\Windows\\Modules"})
    ('posix', 'cmd')
    """
    if system != "nt":
        return "posix"
    places = environment.get("PSModulePath", "").lower().split(";")
    home = environment.get("USERPROFILE", "").lower()
    return "powershell" if any((home and one.startswith(home)) or "\\documents\\" in one for one in places) else "cmd"


SHELL = find_shell()


def plain(text: str, limit: int = 500) -> str:
    """One line without control characters, which could write anywhere on a terminal, and not endless: the middle goes first."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.splitlines()))
    return shorten(shown, limit)


# ---------------------------------------------------------------- commands, as the system's shell reads them


def quote(word: object, shell: Shell = SHELL) -> str:
    """A word as one types it into a shell: POSIX, or cmd and PowerShell, which both know double quotes. Between these, PowerShell
    reads `$` and backticks: there such words stand between single ones.

    >>> print(quote("a rex dog", "posix"), quote("a rex dog", "cmd"), quote("$5 dog", "powershell"), quote("rex.png:0.8", "cmd"))
    'a rex dog' "a rex dog" '$5 dog' rex.png:0.8
    """
    text = str(word)
    if shell == "posix":
        return shlex.quote(text)
    if re.fullmatch(r"[\w./:\\=+-]+", text):
        return text
    if shell == "powershell" and re.search(r"[$`\"\u201c-\u201e]", text):  # it takes curly quotes for straight ones
        return "'" + re.sub(r"(['\u2018-\u201b])", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', text)) + "'"
    inside = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", inside) + '"'


def command_line(*words: object, shell: Shell = SHELL) -> str:
    """Words as one command.

    >>> command_line("personalize", "train", "my photos", shell="cmd")
    'personalize train "my photos"'
    """
    return " ".join(quote(word, shell) for word in words)


def transfer_command(files: Iterable[object], folder: object, *, move: bool = False, shell: Shell = SHELL) -> str:
    """The command that copies files into a folder that is there, or moves them into one that it makes, overwriting nothing.

    >>> transfer_command(["a.png", "b.png"], "aside", move=True, shell="posix")
    'mkdir -p aside && mv -n a.png b.png aside'
    """
    if shell == "posix":
        move_there = f"mkdir -p {quote(folder, shell)} && {command_line('mv', '-n', *files, folder, shell=shell)}"
        return move_there if move else command_line("cp", *files, folder, shell=shell)
    literal = ["'" + str(one).replace("'", "''") + "'" for one in (*files, folder)]  # as PowerShell has them; cmd starts it
    make = f"New-Item -ItemType Directory -Force {literal[-1]} | Out-Null; " if move else ""
    what = "Move-Item" if move else "Copy-Item"
    command = f"{make}{what} -LiteralPath {','.join(literal[:-1])} {literal[-1]}"
    return command if shell == "powershell" else f'powershell -NoProfile -Command "{command}"'


def readable(count: float, short: bool = False) -> str:
    """Bytes as `340 kB`, `1.2 MB`, `3.4 GB`; `short` in two digits at most: `1 MB`, `12 GB`.

    >>> readable(532), readable(1_000_000), readable(1_000_000, short=True), readable(12_300_000_000)
    ('532 B', '1.0 MB', '1 MB', '12.3 GB')
    """
    unit = "B"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    if unit == "B" or (count >= 10 and (short or unit != "GB")):
        return f"{count:.0f} {unit}"
    return f"{count:.2g} {unit}" if short else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds in the units that a person would use.

    >>> duration(0.0123), duration(4.25), duration(48.2), duration(95), duration(7300)
    ('12 ms', '4.2 s', '48 s', '1 min 35 s', '2 h 2 min')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    unit, small, step = ("min", "s", 60) if seconds < 3600 else ("h", "min", 3600)
    whole, rest = divmod(round(seconds) if step == 60 else round(seconds / 60), 60)
    return f"{whole} {unit}" + (f" {rest} {small}" if rest else "")


def significant(value: float) -> str:
    """Three significant digits.

    >>> significant(0.01234), significant(12.34), significant(12345.6), significant(0)
    ('0.0123', '12.3', '12,346', '0')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def compact(value: float) -> str:
    """Three significant digits, small numbers with an exponent.

    >>> compact(0.04), compact(0.0005), compact(123.4), compact(12345.6)
    ('0.04', '5e-4', '123', '12,346')
    """
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return significant(value)


def with_sign(value: float, digits: int = 2) -> str:
    """With its sign, but for what rounds to nothing.

    >>> with_sign(0.5), with_sign(-0.5), with_sign(-0.001)
    ('+0.50', '-0.50', '0.00')
    """
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def pace(steps_per_second: float) -> str:
    """`12.3 steps/s`, or `4.1 s/step` for slow ones."""
    return f"{steps_per_second:.1f} steps/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s/step"


def memory_summary(fit: Mapping[str, Any]) -> str:
    """How a run fits into memory, from what it told: `bfloat16, checkpointing: 5.1 of 8.0 GB (probe), estimate 4.8 GB`."""
    told = [f"{readable(fit['probe'])} of {readable(fit['budget'])} (probe)"] if fit.get("probe") and fit.get("budget") else []
    told += [f"estimate {readable(estimate['peak'])}"] if (estimate := fit.get("estimate")) else []
    return f"{fit['words']}{': ' if told else ''}{', '.join(told)}"


def base_summary(facts: Mapping[str, Any]) -> str:
    """What was loaded of a base, from its facts: the true dtypes, sizes and prediction, whatever was asked for."""
    prediction = facts["prediction"] + (" with zero-terminal SNR" if facts["zero_snr"] else "")
    stored = " and ".join(f"{dtype.lower()} ({readable(size)})" for dtype, size in facts["stored"].items())
    dtypes = dict.fromkeys(dtype for part in facts["dtypes"].values() for dtype in part.split(" and "))
    held = f"{' and '.join(dtypes)} ({readable(facts['bytes'])})"
    million = sum(facts["parameters"].values()) / 1e6
    return f"{facts['title']}, {prediction}, {million:,.0f} M parameters, stored as {stored}, held as {held}"


def in_ascii(text: str) -> str:
    r"""TOML in ASCII, for a file or pipe in a code page: letters outside it as TOML escapes them.

    >>> in_ascii('trigger = "\u732b\U0001f600"')
    'trigger = "\\u732b\\U0001f600"'
    """
    return "".join(one if one.isascii() else f"\\u{ord(one):04x}" if ord(one) < 2**16 else f"\\U{ord(one):08x}" for one in text)


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML file says. Raises ValueError for what is none."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def first_line(error: BaseException) -> str:
    """The first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def spread(n: int, most: int) -> list[int]:
    """At most so many of n, evenly chosen.

    >>> spread(3, 4), spread(10, 4)
    ([0, 1, 2], [0, 2, 5, 7])
    """
    return [i * n // min(n, most) for i in range(min(n, most))]


def slug(prompt: str) -> str:
    """A prompt as the beginning of a file name.

    >>> slug("A Zwx cat, in the snow!")
    'a-zwx-cat-in-the-snow'
    """
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
