"""A1111's prompt syntax for adapters: `a <lora:rex:0.8:lbw=OUTD:start=5> dog` <-> prompt, names and weightings. No torch.

    <lora:NAME>  <lora:NAME:0.8>  <lora:NAME:TE:UNET>  <lora:NAME:te=0.5:unet=0.8>     AUTOMATIC1111, Forge, SD.Next
    <lora:NAME:1:lbw=OUTD:start=10:stop=20>  <lora:NAME:1:OUTD>  <lora:NAME:1:step=5-10>  sd-webui-lora-block-weight
    <lora:NAME:0@0,1@0.5>  <lora:NAME:te=0@0,1@1:unet=1>                                 sd-webui-loractl
    <lyco:NAME:...>                                                                      a1111-sd-webui-lycoris

Everything that may stand behind a file's name after --adapter may stand here too, and means the same; only the order of two bare
strengths is A1111's. Emphasis, as in (word:1.2), and edits, as in [cat:dog:0.5], are left in the prompt (families/notation.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..adapters.strengths.curves import strength_text
from ..adapters.strengths.grammar import PARTS, PRESETS, Weighting, read
from ..errors import AdapterError, RecipeError, nearest
from ..families.notation import foreign
from ..pictures.files import unnameable

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>", re.IGNORECASE)
OPENING = re.compile(r"<(lora|lyco|hypernet):", re.IGNORECASE)
OLD_BLOCKS = re.compile(rf"{'|'.join(PRESETS)}|(?:[-+.\d]+,)+[-+.\d]+", re.IGNORECASE)  # lbw without its name
NOT_HERE = {  # what else is written there, and what to do
    "dyn": "resize the file instead: personalize resize",
    "lbwe": "name the layers by a pattern: *attn2*=0.5",
    "hr": "there is no second pass here",
    "hrte": "there is no second pass here",
}


class Use(NamedTuple):
    """An adapter's name and how much of it."""

    name: str
    weighting: Weighting


class Prompt(NamedTuple):
    """What the text encoder reads, and which adapters go with it."""

    text: str
    uses: tuple[Use, ...]


def parse(prompt: str) -> Prompt:
    """A prompt without its tags, and what they say. Raises RecipeError for tags that say nothing sensible, and for what other
    programs read in prompts and this one does not.

    >>> text, uses = parse("a <lora:rex:0.5:0.8:stop=0.5> dog <lyco:ink>")
    >>> text, [(name, str(weighting)) for name, weighting in uses]
    ('a dog', [('rex', '0.8:0.5:stop=0.5'), ('ink', '1')])
    """
    if unnameable(prompt):
        raise RecipeError(f"a prompt is no UTF-8 text: {prompt[:60]}", "is the terminal, or the file, set to UTF-8?")
    uses = tuple(Use(*parse_tag(match[1], match[2], match[0])) for match in TAG.finditer(prompt))
    text = TAG.sub("", prompt)
    if lost := OPENING.search(text):
        raise RecipeError(f"a tag is not closed: {text[lost.start() : lost.start() + 40]}", "write <lora:NAME:0.8>")
    for name, hint in foreign(text):
        raise RecipeError(f"{name} is not supported, and would be drawn as words: {text[:60]}", hint)
    return Prompt(re.sub(r"(?<=\S) {2,}|^ +| +$|(?<=\S) +(?=[,.;!?])", _gap, text) if uses else text, uses)


def _gap(match: re.Match[str]) -> str:
    """What is left where a tag stood between spaces."""
    inside = match.start() > 0 and match.end() < len(match.string) and match.string[match.end()] not in ",.;!?"
    return " " if inside else ""


def parse_tag(kind: str, inside: str, tag: str) -> tuple[str, Weighting]:
    """The name and weighting that stand between < and >."""
    name, *pieces = [piece.strip() for piece in inside.split(":")]
    if kind.lower() == "hypernet":
        raise RecipeError(f"{tag}: hypernetworks are not supported", "adapters are written <lora:NAME:0.8>")
    if not name:
        raise RecipeError(f"{tag} names no adapter", "write <lora:NAME:0.8>")
    for piece in pieces:
        if (key := piece.partition("=")[0].lower()) in NOT_HERE and "=" in piece:
            raise RecipeError(f"{tag}: {key}= is not supported", NOT_HERE[key])
    try:
        return name, read([f"lbw={piece}" if OLD_BLOCKS.fullmatch(piece) else piece for piece in pieces], text_first=True)
    except AdapterError as error:
        raise RecipeError(f"{tag}: {error.what}", error.hint) from error


def check_negative(negative: str) -> str:
    """The negative prompt, which must name no adapters. Raises RecipeError where it does."""
    if parse(negative).uses:
        raise RecipeError(f"adapters go into the prompt, not into the negative one: {negative[:60]}", "move the tag")
    return negative


def tag(name: str, weighting: Weighting) -> str:
    """The tag that says the same.

    >>> tag("rex", parse("<lora:rex:0.5:0.8:step=5-10>").uses[0].weighting)
    '<lora:rex:0.5:0.8:start=5:stop=10>'
    """
    unet, te, te2 = (weighting.parts[part] for part in PARTS.values())
    said = strength_text(te) if te == unet else f"{strength_text(te)}:{strength_text(unet)}"
    more = [f"te2={strength_text(te2)}"] if te2 != te else []
    return ":".join([f"<lora:{name}:{said}", *more, *filter(None, [weighting.inside])]) + ">"


def with_tags(text: str, uses: Iterable[Use]) -> str:
    """A prompt with its tags behind it, as UIs write it into pictures."""
    return " ".join(filter(None, [text, *(tag(name, weighting) for name, weighting in uses)]))


def tag_name(text: str) -> str:
    """A file's name as it can stand in a tag.

    >>> tag_name("rex: v2 <best>")
    'rex_ v2 _best_'
    """
    return re.sub(r"[:<>]", "_", text).strip()


def find_name(name: str, known: Iterable[str]) -> str:
    """The known name that a tag means; case does not matter. Raises RecipeError that names the nearest."""
    known = list(known)
    same = [one for one in known if one == name] or [one for one in known if one.lower() == name.lower()]
    if not same:
        raise RecipeError(
            f"no adapter is called {name!r}", nearest(name, known) if known else "give it: --adapter FILE or --lora-dir FOLDER"
        )
    return same[0]
