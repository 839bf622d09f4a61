"""What can be wrong with a textual inversion: its vectors, how its tensors are called, and the word that its file's name says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import HostileFileError
from ...findings import Finding
from ...formats.header import short
from ...text import command_line
from ..describe import Description
from ..embedding import Embedding

MANY = 25  # a third of what a prompt holds in one window
READ = ({"emb_params"}, {"clip_l", "clip_g"})  # tensors as A1111, Forge and ComfyUI read them


def vector_findings(about: Description, keys: set[str]) -> Iterator[Finding]:
    """Faults of a textual inversion whose tensors have these keys."""
    try:
        embedding = Embedding.load(about.path)
    except HostileFileError as error:
        yield Finding("error", "unsound", f"{error.what}: this file does not load", (), error.hint or "train it anew")
        return
    norms = {part: vectors.norm(dim=1) for part, vectors in embedding.vectors.items()}
    if dead := [part for part, norm in norms.items() if not norm.all()]:
        yield Finding(
            "warning", "empty", f"some of its vectors for the {dead[0]} are zero: they say nothing", (), "train it anew"
        )
    if embedding.tokens > MANY:
        what = f"it takes {embedding.tokens} of the 75 tokens of a prompt"
        yield Finding("warning", "many-vectors", what, (), "words of 1 to 8 vectors leave room for others")
    if keys not in READ:
        written = command_line("personalize", "convert", about.path, "-o", Path("other") / f"{about.path.stem}.safetensors")
        what = "A1111 and ComfyUI read emb_params, or clip_l and clip_g"
        yield Finding(
            "info", "spelling", f"its tensors are called {', '.join(map(short, sorted(keys)))}", (), f"{what}: {written}"
        )
    if about.trigger and about.trigger != about.path.stem:
        what = f"it was trained as {short(about.trigger)!r}, and prompts call it by its file's name, {short(about.path.stem)!r}"
        yield Finding("info", "renamed", what, (), f"call the file {short(about.trigger)}.safetensors, or write its name")
