"""What other programs make of our files: the layer that each key is applied to, and how strongly. A second opinion; no torch.

Here and not in the doctor, because the export contract (files.py) asks each host before a file takes its name.

Each row follows a reader's own rules, from its source and not from our tables of names; tests hold them against the sources.
They know UNets alone: HOSTS says which families.
A1111 counts blocks in LDM's numbers, three to a level, and takes what it cannot translate for LDM's own names.
ComfyUI makes a table of every layer's names, forward from the model's configuration, under LDM's and diffusers' names.
diffusers rewrites kohya's names by replacing words; LDM's blocks it renumbers first. It takes files that hold LoRA alone.

Scales: what all three multiply up @ down by is alpha / rank, and 1 without an alpha (diffusers: see `scale`). The same goes for
LoHa and LoKr; for a LoKr of two whole halves it is 1 whatever alpha says. In ComfyUI, A1111 and Forge, `dora_scale` [1, in] is
the norm of each column of W + dW, and its strength is taken after that. A full update has no scale.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..families.family import Family, modules
from ..families.names import PARTS, part_of
from .dialects import Slot
from .host_names import a1111_path, comfy_path, diffusers_path, from_openclip
from .kinds import BIASES

Where = Callable[[str, Family], str]  # what stands before a tensor's role, family => canonical path; "" if it is ignored

_FACTORED = ("LoRA", "LoCon (Tucker)", "LoHa", "LoKr")
_NORMED = ("DoRA", "LoHa + DoRA", "LoKr + DoRA")


class Note(NamedTuple):
    """How a host departs from us in a kind that it takes: where a role is there, or with a minus sign is not; "" is always."""

    kind: str  # "": only the bias is changed
    role: str
    what: str

    def of(self, slot: Slot) -> bool:
        """Whether it says something about these tensors."""
        there = self.role.removeprefix("-") in slot.keys
        return slot.name == self.kind and (not self.role or there != self.role.startswith("-"))


@dataclass(frozen=True)
class Host:
    """A reader of adapter files. Kinds are named as Slot.name does."""

    name: str
    where: Where
    dialects: tuple[str, ...]  # that it reads whole
    families: tuple[str, ...]  # that it has, and counts the blocks of
    kinds: tuple[str, ...]  # that it reads; with our dW, but for the notes
    notes: tuple[Note, ...] = ()
    lacks: tuple[str, ...] = ()  # ends of paths that have no name there, however they are written
    alone: bool = False  # whether one tensor that it does not know makes it refuse the file


class Misreading(NamedTuple):
    """A layer that a host would leave out, or find elsewhere (`at`)."""

    host: Host
    path: str
    at: str


def readers(dialect: str, family: Family, slots: Mapping[str, Slot]) -> list[Host]:
    """The hosts that should read these layers of a file, all or those of the kinds that they know."""
    hosts = [host for host in HOSTS if dialect in host.dialects and family.name in host.families]
    return [host for host in hosts if not host.alone or all(_knows(host, slot) for slot in slots.values())]


def misread_layers(dialect: str, family: Family, slots: Mapping[str, Slot]) -> list[Misreading]:
    """Where a host that knows the kind finds a layer (path => its tensors' keys) elsewhere, or not at all.

    Norms, biases, and what a host lacks a name for are not its fault: no other file would serve it better.
    """
    spoken = [(path, slot.name, _stem(dialect, slot)) for path, slot in slots.items() if slot.kind]
    named, wrong = modules(family), []
    for host in readers(dialect, family, slots):
        for path, kind, stem in spoken:
            at = host.where(stem, family) if kind in host.kinds else path
            if at != path and (at or (path in named and not path.endswith(host.lacks))):
                wrong.append(Misreading(host, path, at))
    return wrong


def ignored_layers(host: Host, dialect: str, family: Family, slots: Mapping[str, Slot]) -> list[str]:
    """The layers of a file that a host leaves out, whatever the reason: the dialect, the kind, or the name."""
    known = {path: slot for path, slot in slots.items() if slot.name in ("", *host.kinds)}
    heard = [path for path, slot in known.items() if host.where(_stem(dialect, slot), family) == path]
    return [path for path in slots if path not in set(heard) - _incomplete_attention(host, family, set(heard))]


def departures(host: Host, slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """What a host does otherwise than we, of what it takes => the layers."""
    found: dict[str, list[str]] = {}
    for note in host.notes:
        if own := [path for path, slot in slots.items() if note.of(slot)]:
            found[f"{host.name} {note.what}"] = own
    return found


def scale(host: Host, rank: int, alpha: float | None, usual: float | None) -> float:
    """What a host multiplies the factors of a LoRA by; `usual` is the alpha that most layers of its part have.

    diffusers loses the alphas of attention layers under names of its own making, and goes by the usual one there.
    """
    told = usual if host.alone else alpha
    return 1.0 if told is None else told / rank


def wrong_scales(host: Host, dialect: str, low: Mapping[str, tuple[int, float]]) -> list[str]:
    """The LoRA layers (path => rank, alpha) that a host makes stronger or weaker than alpha / rank says.

    Only kohya's files have alphas: elsewhere they are in `lora_B`, and a config that says so is for peft.
    """
    if dialect != "kohya":
        return []
    alphas = {part: Counter(alpha for path, (_, alpha) in low.items() if part_of(path) == part) for part in PARTS}
    usual = {part: counts.most_common(1)[0][0] for part, counts in alphas.items() if counts}
    return [path for path, (rank, alpha) in low.items() if scale(host, rank, alpha, usual[part_of(path)]) != alpha / rank]


def _knows(host: Host, slot: Slot) -> bool:
    return slot.name in host.kinds and not slot.keys.keys() & set(BIASES)


def _stem(dialect: str, slot: Slot) -> str:
    """What stands before the role in a slot's keys."""
    role, key = next(iter(slot.keys.items()))
    return key.partition(".")[0] if dialect == "kohya" else re.sub(r"\.lora_[AB]\.weight$", "", key.removesuffix(f".{role}"))


def _incomplete_attention(host: Host, family: Family, heard: set[str]) -> set[str]:
    """Attention of OpenCLIP's encoders is one layer in A1111: it takes q, k, v and out together or not at all."""
    if host.name != "A1111":
        return set()
    rows = {path.rpartition(".")[0] for path in heard if ".self_attn." in path and from_openclip(path, family)}
    leaves = ("q_proj", "k_proj", "v_proj", "out_proj")
    torn = {row for row in rows if not all(f"{row}.{leaf}" in heard for leaf in leaves)}
    return {path for path in heard if path.rpartition(".")[0] in torn}


_TUCKER = Note("LoKr", "lokr_t2", "leaves convolutions with a Tucker core out")
_REFUSES = "refuses the whole file for it"
_OUT = "leaves it out"
HOSTS = (
    Host(
        "A1111",
        a1111_path,
        ("kohya",),
        ("sd1", "sd2", "sdxl"),  # three blocks to a level; it has no names for the encoder of SDXL's refiner
        (*_FACTORED, *_NORMED, "OFT", "IA3", "GLoRA", "LoRA+sparse", "full", "norm"),
        (
            Note("GLoRA", "", "reads the order of LyCORIS 1 alone, without alpha, and no convolutions"),
            Note("norm", "-b_norm", _REFUSES),
            Note("", "diff_b", _REFUSES),
            Note("", "b_norm", _REFUSES),
            *(Note(kind, "diff_b", "leaves the bias out") for kind in (*_FACTORED, *_NORMED)),
        ),
        ("text_projection",),
    ),
    Host(
        "ComfyUI",
        comfy_path,
        ("kohya",),
        ("pocket", "sd1", "sd2", "sdxl", "sdxl-refiner"),
        (*_FACTORED, *_NORMED, "GLoRA", "OFT", "full", "norm"),
        (
            _TUCKER,
            Note("OFT", "alpha", "limits the rotation by alpha, not by alpha times the width"),
            Note("OFT", "rescale", "leaves `rescale` of three-sided blocks out"),
            Note("OFT", "", "turns by the square of a strength"),
            Note("OFT", "-alpha", "leaves four-sided blocks out"),
            Note("", "b_norm", _OUT),
        ),
        ("text_projection",),
    ),
    Host(
        "Forge",  # its loader is ComfyUI's of 2024
        comfy_path,
        ("kohya",),
        ("sd1", "sd2", "sdxl"),
        (*_FACTORED, *_NORMED, "GLoRA", "full", "norm"),
        (_TUCKER, Note("", "b_norm", _OUT)),
        ("text_projection",),
    ),
    Host("diffusers", diffusers_path, ("kohya", "diffusers"), ("pocket", "sd1", "sd2", "sdxl"), ("LoRA",), alone=True),
)
