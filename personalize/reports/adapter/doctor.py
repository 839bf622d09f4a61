"""What the doctor of adapters found, as a table and as JSON; the picture is in heatmap.py.

Adapters go by letters, A B C ..., in the order given. What a file says never reaches a terminal raw.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING

from ...text import plain, readable, significant, with_sign
from ..kit.tables import align_columns, counts, letter

if TYPE_CHECKING:
    from ...adapters.doctor.collisions import Collision, Meeting
    from ...adapters.doctor.exam import Checkup
    from ...adapters.doctor.prognosis import Prediction
    from ...findings import Finding

WIDTH = 100  # columns
NAMED = 3  # layers or keys that a finding names


# ---------------------------------------------------------------- table


def table(checkups: Sequence[Checkup], collision: Collision | None = None, predictions: Sequence[Prediction] = ()) -> str:
    """Each file, the strengths by block, each pair by block, block weights that help, and what a merge would lose."""
    lines = [line for place, checkup in enumerate(checkups) for line in (*_file(letter(place), checkup), "")]
    if any(checkup.modules for checkup in checkups):
        lines += [*_strengths(checkups, collision), ""]
    for pair in collision.pairs if collision else ():
        lines += [*_pair(collision, pair), ""]  # type: ignore[arg-type]
    if collision and len(checkups) > 1:
        lines += [*_advice(checkups, collision), ""]
    return "\n".join([*lines, *_forecast(predictions)]).rstrip()


def _file(name: str, checkup: Checkup) -> Iterator[str]:
    about = checkup.about
    yield f"{name}  {plain(str(about.path))}  ({readable(about.bytes)})"
    for label, text in _rows(checkup):
        if text:
            yield from textwrap.wrap(f"{label:<10}{plain(text)}", WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 13)
    for finding in checkup.findings:
        yield from _finding(finding)


def _rows(checkup: Checkup) -> Iterator[tuple[str, str]]:
    about = checkup.about
    names = f"{about.dialect or 'no known'} names"
    if about.words and not about.dialect:
        names = ", ".join(f"{word}: {count} vector{'s' * (count > 1)}" for word, count in about.words.items())
    yield "what", f"{about.kind} for {about.family}, {names}, {about.dtype}"
    yield "trigger", checkup.trigger
    yield "parts", ", ".join(f"{part} ({count} layers)" for part, count in about.parts.items())
    yield "rank", counts(about.ranks, "{:g} in {} layers", 4)
    yield "alpha", counts(about.alphas, "{:g} in {} layers", 4)
    effective = [module.effective for module in checkup.modules if module.effective is not None]
    if effective:
        holds = f"; rank {checkup.needed} holds 99 % of it" if checkup.needed is not None else ""
        yield "in use", f"effective rank {median(effective):.1f} in the median layer{holds}"
    yield "strength", f"||dW|| = {significant(checkup.norm)}" if checkup.modules or about.dialect else ""
    yield "health", _health(checkup)


def _health(checkup: Checkup) -> str:
    counts = {level: sum(one.level == level for one in checkup.findings) for level in ("error", "warning")}
    parts = [f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items() if count]
    return ", ".join(parts) or "sound"


def _finding(finding: Finding) -> Iterator[str]:
    text = plain(finding.what, 300)
    if finding.where:
        more = f" and {len(finding.where) - NAMED} more" if len(finding.where) > NAMED else ""
        text += ": " + ", ".join(plain(str(name), 90) for name in finding.where[:NAMED]) + more
    indent = " " * 15
    yield from textwrap.wrap(
        f"{finding.level:<10}[{finding.code}] {text}", WIDTH, initial_indent=" " * 5, subsequent_indent=indent
    )
    if finding.hint:
        hint = f"-> {plain(finding.hint, 4000)}"  # whole
        yield from textwrap.wrap(hint, WIDTH, initial_indent=indent, subsequent_indent=indent + "   ")


def _strengths(checkups: Sequence[Checkup], collision: Collision | None) -> Iterator[str]:
    """||dW|| by block, at the weights given; as many adapters side by side as fit."""
    norms, blocks = block_norms(checkups, collision), block_names(checkups, collision)
    weights = collision.weights if collision else (1.0,) * len(checkups)
    yield "strength by block: ||dW||, and the share of the adapter's ||dW||^2"
    for first in range(0, len(norms), 4):
        shown = range(first, min(first + 4, len(norms)))
        heads = [cell for i in shown for cell in (letter(i) + (f" x {weights[i]:g}" if weights[i] != 1 else ""), "share")]
        rows = [[block, *(cell for i in shown for cell in _strength(norms[i], block))] for block in blocks]
        total = ["all", *(cell for i in shown for cell in (significant(math.hypot(*norms[i].values())), ""))]
        yield from align_columns([["block", *heads], *rows, total])


def _strength(norms: Mapping[str, float], block: str) -> tuple[str, str]:
    if block not in norms:
        return "-", ""
    total = math.hypot(*norms.values())
    return significant(norms[block]), f"{(norms[block] / total) ** 2 if total else 0:.0%}"


def _pair(collision: Collision, pair: tuple[int, int]) -> Iterator[str]:
    a, b = map(letter, pair)
    met = [one for one in collision.meetings if one.pair == pair]
    if not met:
        yield f"{a} and {b} change no layer in common"
        return
    yield f"{a} and {b}: overlap = sqrt(in * out); chance is what random directions would overlap"
    heads = ["block", "cosine", "overlap", "in", "out", "chance", f"{b} on {a}'s ground", f"{a} on {b}'s ground"]
    yield from align_columns([heads, *map(_meeting, met)])


def _meeting(one: Meeting) -> list[str]:
    shares = (one.overlap, one.inputs, one.outputs, one.chance)
    return [
        one.block,
        with_sign(one.cosine, 3),
        *(f"{share:.3f}" for share in shares),
        *(f"{share:.0%}" for share in one.invaded),
    ]


def _advice(checkups: Sequence[Checkup], collision: Collision) -> Iterator[str]:
    """Block weights, and what they would do."""
    from ...adapters.doctor.prognosis import THRESHOLD, suggest

    suggestions, reliefs = suggest(collision)
    for pair in collision.twins:
        yield f"{' and '.join(map(letter, pair))} are nearly the same update: use one of them, or both at half their strength"
    if not any(one.factors for one in suggestions):
        yield f"no block needs other weights: nowhere do two overlap by more than {THRESHOLD:g}"
        return
    yield "block weights that would help: who has less of itself in a block makes room there"
    for one in (one for one in suggestions if one.factors):
        blocks = ", ".join(f"{block} x {factor:g}" for block, factor in one.factors.items())
        text = f"{letter(one.place)}  {blocks}; keeps {one.kept:.0%} of its ||dW||"
        yield from textwrap.wrap(text, WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 6)
        if one.lbw:
            yield f"      {plain(checkups[one.place].about.path.name)}:{collision.weights[one.place]:g}:lbw={one.lbw}"
    for relief in reliefs:
        names = " and ".join(map(letter, relief.pair))
        yield f"   {names}  overlap {relief.before:.3f} before, {relief.after:.3f} after"


def _forecast(predictions: Sequence[Prediction]) -> Iterator[str]:
    if predictions:
        yield "what merges would change: ||merged - sum|| / ||sum||, before anything is made"
        known = [one for one in predictions if one.error is not None]
        yield from align_columns([[_method(one), f"{one.error:.2%}", _basis(one)] for one in known], left=(0, 2))
        if rest := [one.method for one in predictions if one.error is None]:
            yield from textwrap.wrap(
                f"to be known these must be made: {', '.join(rest)}", WIDTH, initial_indent=" " * 3, subsequent_indent=" " * 6
            )


def _method(one: Prediction) -> str:
    return f"{one.method} at rank {one.rank}" if one.rank else one.method


def _basis(one: Prediction) -> str:
    return "exact" if one.exact else f"tried on {one.layers} of {one.of} layers"


def block_norms(checkups: Sequence[Checkup], collision: Collision | None) -> Sequence[Mapping[str, float]]:
    return collision.norms if collision else [checkup.blocks for checkup in checkups]


def block_names(checkups: Sequence[Checkup], collision: Collision | None) -> Sequence[str]:
    """All blocks in the order of the family; of files that do not go together, in the order met."""
    return collision.blocks if collision else list(dict.fromkeys(block for checkup in checkups for block in checkup.blocks))


# ---------------------------------------------------------------- JSON


def as_json(checkups: Sequence[Checkup], collision: Collision | None = None, predictions: Sequence[Prediction] = ()) -> str:
    """Everything, for programs."""
    from ...adapters.doctor.prognosis import suggest

    values: dict[str, object] = {"files": [_as_values(checkup) for checkup in checkups]}
    if collision:
        suggestions, reliefs = suggest(collision)
        values |= {"collision": asdict(collision), "twins": collision.twins}
        values |= {"suggestions": [asdict(one) for one in suggestions], "relief": [asdict(one) for one in reliefs]}
    values |= {"predictions": [asdict(one) for one in predictions]}
    return json.dumps(values, default=str, ensure_ascii=True)


def _as_values(checkup: Checkup) -> dict[str, object]:
    about = {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(checkup.about).items()}
    return {
        "about": about,
        "trigger": checkup.trigger,
        "norm": checkup.norm,
        "needed": checkup.needed,
        "blocks": dict(checkup.blocks),
        "findings": [
            {"severity": one.level, "code": one.code, "what": one.what, "where": one.where, "hint": one.hint}
            for one in checkup.findings
        ],
        "modules": [asdict(module) for module in checkup.modules],
    }
