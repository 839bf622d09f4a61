"""One file, examined: its tensors are read one by one, so that a file that would not load can still be told what ails it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...families.names import family_of
from ...findings import LEVELS, Finding, worst_first
from ...formats.header import read_header
from .. import dialects
from ..describe import TEXTUAL_INVERSION, Description, describe
from ..ops.report import Line, Report
from .findings import CHECKS
from .measures import SHARE, Exam, Module, Weights, block_norms, block_of, measure, read_updates
from .vectors import vector_findings


@dataclass(frozen=True)
class Checkup:
    """All about one file. `needed` is the rank, the same in all layers, that would hold SHARE of it."""

    about: Description
    trigger: str
    modules: tuple[Module, ...]
    needed: int | None
    findings: tuple[Finding, ...]

    @cached_property
    def blocks(self) -> Mapping[str, float]:
        """Block => ||dW||, in the order of the family; parts where the family is unknown."""
        return block_norms(self.about.family, {module.path: module.norm for module in self.modules})

    @property
    def norm(self) -> float:
        """||dW|| of the whole."""
        return math.hypot(*self.blocks.values())

    @property
    def loads(self) -> bool:
        """Whether Adapter.load takes the file as it is."""
        return bool(self.modules) and not any(finding.code in ("not-finite", "unmatched") for finding in self.findings)

    @property
    def worst(self) -> str:
        """The worst level of all findings; "" for a sound file."""
        return next((level for level in LEVELS if any(one.level == level for one in self.findings)), "")


def examine(path: str | Path, weights: Weights | None = None) -> Checkup:
    """A file's description, strengths, spectra and findings; `weights` are those of the base, if it is known.

    NaN and Inf, unmatched keys and missing halves are findings. Raises AdapterError for a missing file, or a base that lacks a
    layer; HostileFileError for an unsound file.
    """
    about = describe(path)
    header = read_header(about.path)
    if about.kind == TEXTUAL_INVERSION:
        faults = worst_first(vector_findings(about, set(header.tensors)))
        return Checkup(about, about.trigger, (), None, tuple(faults))
    reading = dialects.read_keys(header)
    family = family_of(reading.shapes, reading.metadata)
    modules: list[Module] = []
    lines: list[Line] = []
    sick: list[str] = []
    for update in read_updates(header, reading, family):
        sick += update.sick
        if update.delta:
            module, line = measure(update, block_of(family, update.path), weights)
            modules.append(module)
            lines += [line] if line else []
    needed = Report(tuple(lines)).rank_for(math.sqrt(1 - SHARE)) if lines else None
    exam = Exam(header, reading, about, family, modules, sick, needed, weights is not None)
    found = worst_first(finding for check in CHECKS for finding in check(exam))
    return Checkup(about, about.trigger or likely_trigger(header.metadata), tuple(modules), needed, tuple(found))


def likely_trigger(metadata: Mapping[str, str]) -> str:
    """The caption or tag that most pictures had, as kohya's trainer counts them; "" if it does not say."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts = Counter({tag.strip(): int(n) for tags in folders.values() for tag, n in tags.items() if tag.strip()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ""  # a stranger's text
    return counts.most_common(1)[0][0] if counts else ""
