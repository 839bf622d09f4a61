"""Adapters onto MODEL and CLIP, by Comfy's own functions: part by part, block by block, and step by step as a hook.

What is said behind a file's name in `personalize generate` is said here: 0.8, unet=0.8:te=0.5, 0.8:lbw=OUTD, *attn2*=0.5,
0@0,1@0.5, start=5:stop=10. The core tells how strong each layer is; the tensors of layers with one strength go to Comfy together.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host
from .core import core
from .values import Adapters, Use

Tensors = Mapping[str, Any]


@dataclass
class Applied:
    """What came of it."""

    model: Any
    clip: Any
    hooks: Any
    lines: list[str]


def apply(adapters: Adapters, model: Any, clip: Any, hooks: Any, steps: int) -> Applied:
    """Put each adapter on. What changes from step to step comes as hooks, which the CLIP that is returned carries along, so that
    every text that it reads draws with them. Raises AdapterError, in the core's words."""
    found = Applied(model, clip, hooks, [])
    moving: list[Any] = []
    for one in adapters:
        weighting = read_strength(one.strength)
        groups, total = groups_of(one, weighting)
        if weighting.moves:
            moving += [hook for part, tensors, strength in groups for hook in hooks_of(part, tensors, strength, weighting, steps)]
            found.lines.append(f"{one.name}: {total} layers, step by step")
        else:
            found.lines.append(put_on(found, one.name, groups, total))
    if moving:
        carry(found, moving)
    return found


def read_strength(text: str) -> Any:
    """How much of an adapter, and when. Raises AdapterError."""
    return core("adapters.strengths.grammar").read([piece for piece in (text.strip() or "1").split(":") if piece])


def groups_of(one: Use, weighting: Any) -> tuple[list[tuple[str, Tensors, float]], int]:
    """(part, tensors, strength) of layers that go together, and how many layers there are. A strength is by block and pattern,
    and by part too where it does not move."""
    import comfy.utils

    path, reading = readable(one.path)
    strengths = (weighting.shape if weighting.moves else weighting).of(reading.slots, family_of(reading))
    tensors, grouped = comfy.utils.load_torch_file(path, safe_load=True), dict[tuple[str, float], dict[str, Any]]()
    said: dict[str, tuple[str, float]] = {}
    for layer, slot in reading.slots.items():
        group = (layer.partition(".")[0], strengths[layer])
        for key in slot.keys.values():
            if said.setdefault(key, group) != group:
                raise ValueError(f"{one.name}: {layer} shares its tensors with other layers, and they have one strength")
            grouped.setdefault(group, {})[key] = tensors[key]
    return [(part, found, strength) for (part, strength), found in grouped.items() if strength], len(reading.slots)


def readable(path: str) -> tuple[str, Any]:
    """A file whose names Comfy knows, with what it holds: the file itself, or a copy under kohya's names."""
    header = core("formats.header").read_header(Path(path))
    reading = core("adapters.contract").read_keys(header, True)
    if reading.dialect == "kohya":
        return path, reading
    to = host.temporary() / "renamed" / host.stamp([Path(path)])[:16] / f"{Path(path).stem}.safetensors"
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            core("adapters").Adapter.load(path, allow_unmatched=True).save(to, "kohya")
    return str(to), core("adapters.contract").read_keys(core("formats.header").read_header(to), True)


def family_of(reading: Any) -> Any:
    """The family that the layers are of; None if it is unknown."""
    return next(iter(core("families.names").candidates(reading.shapes, reading.metadata)), None)


def put_on(found: Applied, name: str, groups: Iterable[tuple[str, Tensors, float]], total: int) -> str:
    """Put constant strengths on, and tell how many weights took them."""
    import comfy.sd

    if found.model is None and found.clip is None:
        return f"{name}: {total} layers; no MODEL or CLIP is connected"
    before = patched(found.model) + patched(found.clip)
    for _, tensors, strength in groups:
        model, clip = comfy.sd.load_lora_for_models(found.model, found.clip, dict(tensors), strength, strength)
        found.model, found.clip = model if found.model is not None else None, clip if found.clip is not None else None
    count = patched(found.model) + patched(found.clip) - before
    if count == 0:
        logging.warning(
            "personalize: %s changes nothing of this model: it was made for another family, or its strength is 0", name
        )
    return f"{name}: {count} weights changed, of {total} layers"


def patched(one: Any) -> int:
    """How many updates lie on a MODEL or CLIP."""
    patcher = getattr(one, "patcher", one)
    return sum(len(patches) for patches in patcher.patches.values()) if patcher is not None else 0


# ---------------------------------------------------------------- step by step


def hooks_of(part: str, tensors: Tensors, strength: float, weighting: Any, steps: int) -> list[Any]:
    """A hook of Comfy's, with a keyframe wherever the strength changes; none where it is always 0."""
    import comfy.hooks

    levels = [weighting.levels(step, steps)[part] for step in range(steps)]
    if not any(levels):
        return []
    frames = comfy.hooks.HookKeyframeGroup()
    for step, level in enumerate(levels):
        if step == 0 or level != levels[step - 1]:
            frames.add(comfy.hooks.HookKeyframe(strength=level, start_percent=step / steps, guarantee_steps=1))
    group = comfy.hooks.create_hook_lora(dict(tensors), strength, strength)
    group.set_keyframes_on_hooks(frames)
    return [group]


def carry(found: Applied, moving: list[Any]) -> None:
    """Let the hooks be found: as an output, and with the CLIP, as `Set CLIP Hooks` does it."""
    import comfy.hooks

    found.hooks = comfy.hooks.HookGroup.combine_all_hooks([*([found.hooks] if found.hooks else []), *moving])
    if found.clip is None:
        return
    clip = found.clip.clone()
    clip.apply_hooks_to_conds = found.hooks
    clip.patcher.forced_hooks = found.hooks.clone()
    clip.use_clip_schedule = True
    clip.patcher.register_all_hook_patches(found.hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
    found.clip = clip
