"""What an examination of files finds wrong or odd: one type for the doctor of adapters and the report on a dataset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("error", "warning", "info")  # the worst first: it will fail or cost quality; it may; it is good to know


@dataclass(frozen=True)
class Finding:
    """One thing that a person should know, and at most one thing to do about it.

    >>> Finding("info", "fp32", "fp32: fp16 halves it", hint="save it as fp16").hint
    'save it as fp16'
    """

    level: str  # of LEVELS
    code: str  # stable, so that scripts can look for it
    what: str
    where: tuple[str | Path, ...] = ()  # layers or keys of an adapter, files of a dataset
    hint: str = ""  # what to do
    command: bool = False  # whether the hint can be typed into a shell as it is
    mark: str = ""  # the word that is shown on each file of `where`

    @property
    def sentence(self) -> str:
        """What was found and what to do about it, as one line."""
        return f"{self.what}; {self.hint}" if self.hint else self.what


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sorted by level; findings of one level keep their order."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
