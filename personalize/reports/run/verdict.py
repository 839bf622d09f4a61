"""What was found about the chosen adapter, and what the base can draw of the training images: words beside the images."""

from __future__ import annotations

from dataclasses import dataclass

from ...training.events import Judged, parse
from ...training.verdict import Words, describe, kept_words
from ..kit.pictures import Picture
from .pictures import Inline
from .read import Run, number

SHEET = 1400  # longest side of a sheet on the page, in pixels


@dataclass(frozen=True)
class Verdict:
    """The words of the chosen adapter's judgement, and the images that it rests on."""

    words: Words
    step: int
    strength: float
    sheet: Picture | None


@dataclass(frozen=True)
class Autoencoder:
    """Training images above what the base's autoencoder gives back of them."""

    sheet: Picture
    kept: str  # how much, in words
    concern: str


def judgement(run: Run) -> Judged | None:
    """The last judgement of the chosen step, at the preferred strength; None where nothing was judged."""
    step = run.chosen["step"] if run.chosen else None
    records = [record for record in run.judged if record["step"] == step]
    found = parse(records[-1]) if records else None
    return found if isinstance(found, Judged) else None


def verdict(run: Run, inline: Inline) -> Verdict | None:
    """What the page says of the chosen adapter."""
    found = judgement(run)
    if found is None:
        return None
    return Verdict(describe(found), found.step, found.strength, inline(found.path, SHEET) if found.path else None)


def autoencoder(run: Run, inline: Inline) -> Autoencoder | None:
    """What was shown of the autoencoder before training, if its sheet is there."""
    for record in reversed(run.encoded):
        kept = [value for value in map(number, record["kept"]) if value is not None]
        sheet = inline(str(record["path"]), SHEET)
        if sheet and kept:
            words = kept_words(sum(kept) / len(kept), number(record.get("usual")))
            return Autoencoder(sheet, words, str(record.get("concern") or ""))
    return None
