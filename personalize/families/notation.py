r"""What people write into prompts and captions beside words, without the encoder: escapes, choices, and edits by step.

    \( \)  \[ \]  \{ \}            plain brackets
    {red|blue}                     one of several, drawn anew for each seed or training step (dynamic prompts, kohya's trainer)
    [cat:dog:0.5]  [dog:10]  [cat::0.5]  [cat|dog]     prompt editing and alternation, as AUTOMATIC1111 schedules them

How much words weigh, and BREAK, are emphasis.py's. Everything else that other programs read has a row in FOREIGN.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .emphasis import pieces

MOST = 64  # so many ways of choosing are kept apart
CHOICE = re.compile(r"(?<!\\)\{([^{}]*\|[^{}]*)(?<!\\)\}")
TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
FOREIGN = (  # what it looks like, its name, what to do
    (r"\bAND\b", "AND, two prompts at once,", "draw them apart, or write 'and'"),
    (r"(?<!\w)__[\w/*-]*\w[\w/*-]*__(?!\w)", "a file of wildcards", "write {red|blue}"),
    (r"\{[^{}]*(?:\$\$|::)[^{}]*\}", "a choice with numbers in it", "write {red|blue}"),
    (
        r"(?<!\\)\{(?!(?i:trigger|class)\})[^{}|]*(?<!\\)\}",
        "a word in braces",
        r"write (word:1.05), or \{ for a brace",
    ),
    (r"(?<!\w)embedding:\S", "an embedding by name", "leave it out"),
    (r"\)\.(?:blend|swap|and)\(", "InvokeAI's function of prompts", "write [cat:dog:0.5]"),
    (r"(?<!\\)\)(?:\+{1,3}|-{1,3}|\d\.\d+)(?![\w.])", "InvokeAI's weight behind a bracket", "write (word:1.3)"),
)
_WORD = r"(?:trigger|class|name|concept|subject|token)(?:[_-]?word)?"
_SIGNS = (f"<{_WORD}>", f"%{_WORD}%", rf"\${_WORD}\b", rf"\$\{{{_WORD}\}}", r"\[(?:name|filewords|trigger[_-]?word)\]")
UNFILLED = (  # of captions: placeholders of other trainers, and what only means something in a prompt
    (f"(?i){'|'.join(_SIGNS)}", "a placeholder that nothing fills in"),
    (r"<(?:lora|lyco|hypernet):[^<>]*>", "an adapter's name"),
)


def escape(text: str) -> str:
    r"""Text that somebody typed, so that a prompt or caption means just that text.

    >>> escape("katarina_(league)")
    'katarina_\\(league\\)'
    """
    return re.sub(r"[\\()\[\]{}]", r"\\\g<0>", text)


def unescape(text: str) -> str:
    r"""The text that was escaped; other text stays.

    >>> unescape(r"katarina_\(league\)"), unescape("katarina_(league)")
    ('katarina_(league)', 'katarina_(league)')
    """
    return re.sub(r"\\([\\()\[\]{}:])", r"\1", text)


def plain_text(prompt: str) -> str:
    r"""What the encoder reads of a prompt, as words.

    >>> plain_text(r"ganyu \(genshin\), (red collar:1.3)")
    'ganyu (genshin), red collar'
    """
    return " ".join("".join(" " if weight is None else text for text, weight in pieces(prompt)).split())


def foreign(prompt: str) -> Iterator[tuple[str, str]]:
    """(name, what to do) of everything in a prompt that other programs read and this one does not."""
    yield from ((f"{name} ({match[0][:40]})", hint) for look, name, hint in FOREIGN if (match := re.search(look, prompt)))


def foreign_in_caption(caption: str) -> list[str]:
    """What a caption holds that is learned as words, by name: also what only means something while drawing.

    >>> foreign_in_caption("a [name] <lora:x:1>")
    ['a placeholder that nothing fills in', "an adapter's name"]
    """
    names = [name for look, name, _ in FOREIGN if re.search(look, caption)]
    names += [name for look, name in UNFILLED if re.search(look, caption)]
    return names + ["prompt editing, as in [cat:dog:0.5]"] * has_edits(variants(caption)[0])


def certain_words(caption: str) -> str:
    """What a caption says whatever is chosen, drawn or filled in.

    >>> certain_words("a {red|blue} cat of [name], [day:night:0.5]").split()
    ['a', 'cat', 'of', ',']
    """
    for look in (*(row[0] for row in (*FOREIGN, *UNFILLED)), CHOICE.pattern):
        caption = re.sub(look, " ", caption)
    return plain_text("".join(node for node in _nodes(caption) if isinstance(node, str)))


def choose(text: str, pick: Callable[[int], int]) -> str:
    """Text with its choices made, the innermost first; `pick` answers for so many options.

    >>> choose("a {red|{dark|light} blue} cat", lambda count: count - 1)
    'a light blue cat'
    """
    while match := CHOICE.search(text):
        options = match[1].split("|")
        text = f"{text[: match.start()]}{options[pick(len(options))].strip()}{text[match.end() :]}"
    return text


def choose_by_seed(text: str, seed: int) -> str:
    """Text with its choices made: the same for the same seed."""
    return choose(text, random.Random(f"{seed} {text}").randrange)


def variants(text: str) -> list[str]:
    """All ways to make a text's choices, or MOST of very many.

    >>> variants("a {red|blue} cat")
    ['a red cat', 'a blue cat']
    """
    count = math.prod(match[1].count("|") + 1 for match in CHOICE.finditer(text))
    if count <= MOST and "{" not in CHOICE.sub("", text):
        return list(dict.fromkeys(choose(text, _digits(number)) for number in range(count)))
    return list(dict.fromkeys(choose_by_seed(text, number) for number in range(MOST)))


def _digits(number: int) -> Callable[[int], int]:
    """The digits of a number, one after the other, each in the base that is asked for."""

    def digit(base: int) -> int:
        nonlocal number
        number, rest = divmod(number, base)
        return rest

    return digit


def settle(text: str) -> str:
    """A prompt as one text: its first choices, as it is at the end of drawing."""
    return at_step(variants(text)[0], 1, 1)


# ---------------------------------------------------------------- prompt editing


@dataclass(frozen=True)
class _Edit:
    """`[before:after:when]`: `after` from the step behind `when` on."""

    before: Sequence[Node]
    after: Sequence[Node]
    when: str

    def at(self, step: int, steps: int) -> str:
        value = float(self.when)
        last = min(steps, int(value * steps if "." in self.when else value))
        return _text_at(self.before if step <= last else self.after, step, steps)


@dataclass(frozen=True)
class _Turns:
    """`[a|b]`: one after the other, step by step."""

    options: Sequence[Sequence[Node]]

    def at(self, step: int, steps: int) -> str:
        return _text_at(self.options[(step - 1) % len(self.options)], step, steps)


Node = str | _Edit | _Turns


@dataclass
class _Bracket:
    """What stands behind a bracket that is not closed yet, cut at its colons and bars."""

    sign: str
    parts: list[list[Node]] = field(default_factory=lambda: [[]])
    cuts: list[str] = field(default_factory=list)

    def flat(self, end: str = "") -> list[Node]:
        """As it is written."""
        nodes: list[Node] = [self.sign, *self.parts[0]]
        for cut, part in zip(self.cuts, self.parts[1:], strict=True):
            nodes += [cut, *part]
        return [*nodes, end]

    def close(self) -> list[Node]:
        """What a pair of square brackets means; emphasis stays as it is written."""
        kinds, last = set(self.cuts), self.parts[-1]
        if kinds == {"|"}:
            return [_Turns(self.parts)]
        if kinds == {":"} and len(self.cuts) <= 2 and len(last) == 1 and isinstance(last[0], str) and NUMBER.fullmatch(last[0]):
            return [_Edit(self.parts[0] if len(self.cuts) == 2 else [], self.parts[-2], last[0])]
        return self.flat("]")


def at_step(prompt: str, step: int, steps: int) -> str:
    """The prompt at a step, counted from 1, of so many.

    Whole numbers are steps, others shares of all steps, as in AUTOMATIC1111; what is no edit stays as it is.

    >>> [at_step("a [cat:dog:0.5] on a [red|blue] mat", step, 4) for step in (1, 2, 3)]
    ['a cat on a red mat', 'a cat on a blue mat', 'a dog on a red mat']
    """
    return _text_at(_nodes(prompt), step, steps) if "[" in prompt else prompt


def has_edits(prompt: str) -> bool:
    """Whether a prompt differs from step to step."""
    return any(not isinstance(node, str) for node in _nodes(prompt))


def _text_at(nodes: Sequence[Node], step: int, steps: int) -> str:
    return "".join(node if isinstance(node, str) else node.at(step, steps) for node in nodes)


def _nodes(prompt: str) -> list[Node]:
    """Text and edits, in order. Brackets without a partner are text."""
    stack = [_Bracket("")]
    for match in TOKEN.finditer(prompt):
        token, top = match[0], stack[-1]
        if token in ("[", "("):
            stack.append(_Bracket(token))
        elif token in (":", "|") and top.sign == "[":
            top.cuts.append(token)
            top.parts.append([])
        elif token == "]" and top.sign == "[":
            stack.pop()
            stack[-1].parts[-1] += top.close()
        elif token == ")" and top.sign == "(":
            stack.pop()
            stack[-1].parts[-1] += top.flat(")")
        else:
            top.parts[-1].append(token)
    while len(stack) > 1:
        left = stack.pop()
        stack[-1].parts[-1] += left.flat()
    return stack[0].parts[0]
