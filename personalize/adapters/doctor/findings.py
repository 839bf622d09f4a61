"""What can be wrong with an adapter file. One check per fault; codes are stable, so that scripts can look for them.

What UIs read was seen by running ComfyUI 0.3.64, A1111 1.10.1, Forge (June 2025), InvokeAI 6.14.2 and stable-diffusion.cpp, and
for IA3, OFT and GLoRA the loaders alone of the first three (tests/test_hosts.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from ...families.names import A1111, part_of, says
from ...findings import Finding
from ...formats.header import short
from .. import dialects, hosts
from ..kinds import ALPHA, DORA, MAGNITUDE, row
from .measures import SHARE, Exam, Module

Check = Callable[[Exam], Iterator[Finding]]
DEAD = 1e-6  # of the usual norm per entry
WILD = 10  # median absolute deviations of its logarithm, and at least this many times the usual
FEW = 8  # layers tell what is usual
LARGE = 1_000_000  # bytes: smaller files need not be halved

UIS = [host for host in hosts.HOSTS if not host.alone]
INVOKEAI = ("OFT", "GLoRA")  # kinds that it does not read


# ---------------------------------------------------------------- numbers


def non_finite_tensors(exam: Exam) -> Iterator[Finding]:
    if exam.sick:
        what = f"{_count(exam.sick, 'tensor')} of {len(exam.header.tensors)} hold NaN or Inf: this file does not load"
        yield Finding(
            "error", "not-finite", what, tuple(exam.sick), "the training diverged: use an earlier save, or a lower rate"
        )


def dead_layers(exam: Exam) -> Iterator[Finding]:
    """Layers that change nothing, or a millionth of what is usual."""
    if exam.modules and not any(module.norm for module in exam.modules):
        yield Finding("error", "empty", "it changes nothing: every update is zero", (), "it was saved before it learned")
        return
    quiet = []
    for group in _groups(exam.modules).values():
        sizes = [_size(module) for module in group if module.norm]
        usual = median(sizes) if sizes else math.inf
        quiet += [module.path for module in group if _size(module) <= DEAD * usual]
    if quiet:
        what = f"{_count(quiet, 'layer')} of {len(exam.modules)} change nothing"
        yield Finding("warning", "dead", what, tuple(quiet), "they were not trained, or were pruned; resizing can drop them")


def exploding_layers(exam: Exam) -> Iterator[Finding]:
    """Layers far above the others of their part, or, with a base, above their own weight."""
    wild: dict[str, float] = {}
    for group in _groups([module for module in exam.modules if module.norm]).values():
        logs = [math.log(_size(module)) for module in group]
        usual = median(logs)
        limit = max(WILD * median(abs(one - usual) for one in logs), math.log(WILD))
        if len(group) >= FEW:
            wild |= {m.path: math.exp(x - usual) for m, x in zip(group, logs, strict=True) if x - usual > limit}
    hint = "weaken them by a pattern (FILE:*name*=0.1), or train at a lower rate"
    if wild:
        worst = max(wild.values())
        what = f"{_count(wild, 'layer')} far above the others of their part, the worst {worst:,.0f} times the usual"
        yield Finding("warning", "exploding", what, _largest_first(wild), hint)
    over = {module.path: module.ratio for module in exam.modules if module.ratio and module.ratio > 1 and len(module.shape) > 1}
    if over:
        what = f"{_count(over, 'layer')} larger than the base's own weight, up to {max(over.values()):.3g} times"
        yield Finding("warning", "overwhelming", what, _largest_first(over), hint)


def unused_rank(exam: Exam) -> Iterator[Finding]:
    usual = next(iter(exam.about.ranks), 0)
    if usual >= 8 and exam.needed is not None and 2 * exam.needed <= usual:
        what = f"rank {usual}, and {100 * SHARE:.0f} % of it lie in {exam.needed}"
        hint = f"resize with the rule error at {math.sqrt(1 - SHARE):.2g}: at most {exam.needed / usual:.0%} of its size"
        yield Finding("info", "rank-unused", what, (), hint)


def fp32_weights(exam: Exam) -> Iterator[Finding]:
    if exam.about.dtype == "fp32" and exam.about.bytes >= LARGE:
        yield Finding("info", "fp32", "fp32: fp16 halves it at an error of about 3e-4", (), "save it as fp16")


# ---------------------------------------------------------------- what it says


def unmatched_keys(exam: Exam) -> Iterator[Finding]:
    lost = exam.reading.unmatched
    if lost:
        whole = f"{_count(lost, 'tensor')} of {len(exam.header.tensors)}"
        what = f"{whole} belong to no known layer, or lack their other half: this file does not load"
        kind = exam.reading.kind
        hint = "UIs skip these without a word; it may be of another model"
        yield Finding("error", "unmatched", what, lost, hint if exam.reading.slots or kind == "unknown" else f"it is a {kind}")


def missing_alpha(exam: Exam) -> Iterator[Finding]:
    """Without alpha and config, readers take alpha = rank."""
    slots = {path: slot for path, slot in exam.reading.slots.items() if dialects.rank(exam.header, slot)}
    lacking = [path for path, slot in slots.items() if ALPHA not in slot.keys and row(slot.kind).alpha_scales]
    lacking = [path for path in lacking if path not in dialects.configured_scales(exam.header, exam.reading)] if lacking else []
    if lacking:
        peft = exam.reading.dialect != "kohya"
        origin = " and no LoraConfig, as peft keeps both beside its files" if peft else ""
        what = f"no alpha in {_count(lacking, 'layer')}{origin}: taken for the rank"
        hint = "if it was trained with another alpha, use it at the strength alpha / rank"
        yield Finding("warning" if peft else "info", "alpha-missing", what, tuple(lacking), hint)
    if 0 in exam.about.alphas and all(row(slot.kind).alpha_scales for slot in slots.values()):  # in OFT it is a bound
        what = f"alpha is 0 in {_count(range(exam.about.alphas[0]), 'layer')}, which some tools take for alpha = rank"
        yield Finding("warning", "alpha-zero", what, (), "save it again: strengths are kept and alphas are not 0")


def metadata_numbers(exam: Exam) -> Iterator[Finding]:
    """Rank and alpha as the metadata say, against the tensors."""
    plain = exam.reading.kind.startswith(("LoRA", "DoRA", "LoHa"))
    for key, name, found in (("ss_network_dim", "rank", exam.about.ranks), ("ss_network_alpha", "alpha", exam.about.alphas)):
        said = _number(exam.header.metadata.get(key, ""))
        if plain and said is not None and found and not any(math.isclose(said, one, rel_tol=1e-3) for one in found):
            what = f"{key} says {said:g}, the tensors' {name} is {_short_list(found)}"
            yield Finding("warning", f"metadata-{name}", what, (), "the tensors are right; saving again mends it")


def metadata_family(exam: Exam) -> Iterator[Finding]:
    """UIs sort files by what they say, not by their layers."""
    if exam.family is None:
        if exam.modules:
            yield Finding(
                "warning", "family-unknown", "its layers are of no known family", (), "UIs may refuse, skip or pad them"
            )
        return
    said, metadata = ("ss_base_model_version", "modelspec.architecture"), exam.header.metadata
    wrong = {key: metadata[key] for key in said if metadata.get(key) and not says({key: metadata[key]}, exam.family)}
    taken, right = _a1111(metadata), A1111.get(exam.family.name)
    hidden = bool(right) and taken not in ("", right)
    effect = f": A1111 takes it for {taken} and hides it beside {right} models" if hidden else ""
    hint = "saving it again writes what its layers are"
    if wrong:
        words = " and ".join(f"{key} says {value}" for key, value in wrong.items())
        level = "warning" if hidden or not right else "info"
        yield Finding(level, "metadata-family", f"{words}, its layers are of {exam.family.name}{effect}", tuple(wrong), hint)
    elif right and said[0] not in metadata and " or " not in exam.about.family:
        level = "warning" if hidden else "info"
        yield Finding(level, "metadata-missing", f"{said[0]} is missing{effect or ': UIs cannot tell its family'}", (), hint)


def heavy_metadata(exam: Exam) -> Iterator[Finding]:
    """Tags of thousands of captions, or a workflow, copied into every file."""
    if heavy := exam.about.heaviest:
        key, size, total = heavy
        what = f"its metadata hold {total:,} bytes, more than its tensors, {short(key)} alone {size:,}"
        yield Finding("info", "metadata-heavy", what, (key,), "save it with --strip-metadata")


def family_open(exam: Exam) -> Iterator[Finding]:
    """Layers that several families share, in a file that does not say which it is of."""
    if " or " in exam.about.family:
        what = f"its layers are those of {exam.about.family}, and nothing in it tells which"
        yield Finding("info", "family-open", what, (), "say it when saving: --family")


# ---------------------------------------------------------------- who reads it


def dora_axis(exam: Exam) -> Iterator[Finding]:
    """UIs norm columns: [1, in]. peft and LyCORIS' wd_on_out norm rows."""
    rows = []
    for path, slot in exam.reading.slots.items():
        shape = dialects.shapes(exam.header, slot).get(DORA, ())
        if MAGNITUDE in slot.keys or (shape and shape[0] != 1):
            rows.append(path)
    if rows:
        what = f"DoRA with norms of rows in {_count(rows, 'layer')}: ComfyUI, A1111 and Forge read it wrong without a word"
        yield Finding("error", "dora-axis", what, tuple(rows), "name the --base and save it as a full update")


def unread_kinds(exam: Exam) -> Iterator[Finding]:
    """Kinds and names that some UIs do not know."""
    slots = exam.reading.slots
    for kind in dict.fromkeys(slot.kind for slot in slots.values() if slot.kind):
        own, title = tuple(path for path, slot in slots.items() if slot.kind == kind), row(kind).title
        if deaf := [ui.name for ui in UIS if title not in ui.kinds] + ["InvokeAI"] * (title in INVOKEAI):
            what = f"{title} in {_count(own, 'layer')}: not read by {' and '.join(deaf)}"
            yield Finding("warning", "kind-unread", what, own, "name the --base and save it as a full update, or extract LoRA")
    if exam.reading.dialect in dialects.DOTTED:
        what = f"{exam.reading.dialect}'s names: A1111 and Forge do not read them, and ComfyUI reads a part"
        yield Finding("warning", "dialect-unread", what, (), "save it in kohya's names")
    outer = tuple(path for path in slots if path.startswith(("unet.conv_in", "unet.conv_out", "unet.time_emb", "unet.add_emb")))
    if outer:
        what = f"it changes {_count(outer, 'layer')} outside the blocks, which stable-diffusion.cpp does not read"
        yield Finding("info", "outer-layers", what, outer)


def misread_kinds(exam: Exam) -> Iterator[Finding]:
    """Kinds that a UI takes, and makes something else of."""
    for ui in UIS:
        if exam.family and exam.family.name in ui.families:
            for what, own in hosts.departures(ui, exam.reading.slots).items():
                yield Finding("warning", "read-otherwise", what, tuple(own), "name the --base and save it as a full update")


def unread_names(exam: Exam) -> Iterator[Finding]:
    """Blocks as LDM or as diffusers names them, and text encoders as OpenCLIP does."""
    stems = {path: next(iter(slot.keys.values())) for path, slot in exam.reading.slots.items()}
    if exam.reading.dialect == "kohya" and (own := tuple(path for path, key in stems.items() if "_resblocks_" in key)):
        what = f"{_count(own, 'layer')} under OpenCLIP's names, which no UI reads"
        yield Finding("warning", "openclip-names", what, own, "saving it again gives them the names that UIs read")
    if exam.reading.dialect != "kohya" or exam.family is None or exam.family.name == "pocket":
        return
    first = {path: next(iter(slot.keys.values())) for path, slot in exam.reading.slots.items() if path.startswith("unet.")}
    ldm = {path: key for path, key in first.items() if any(f"_{block}_block" in key for block in ("input", "middle", "output"))}
    other = {path: key for path, key in first.items() if any(f"_{block}_block" in key for block in ("down", "mid", "up"))}
    hint = "saving it again gives each family the names that all UIs read"
    if ldm and other:
        what = f"{len(ldm)} layers under LDM's names and {len(other)} under diffusers': InvokeAI refuses the mixture"
        yield Finding("warning", "names-mixed", what, (), hint)
    elif ldm and exam.family.name in ("sd1", "sd2"):
        yield Finding("warning", "names-ldm", "LDM's names, which InvokeAI does not read for SD 1 and 2", (), hint)
    convolutions = tuple(path for path in other if "resnets" in path or "samplers" in path)
    if convolutions and exam.family.name.startswith("sdxl"):
        what = f"{_count(convolutions, 'convolution')} under diffusers' names, which A1111 does not read for SDXL"
        yield Finding("warning", "names-convolution", what, convolutions, hint)


def unknown_strengths(exam: Exam) -> Iterator[Finding]:
    shut = tuple(module.path for module in exam.modules if not module.exact)
    if shut and not exam.based:
        names = ", ".join(sorted({module.kind for module in exam.modules if not module.exact}))
        what = f"{names} in {_count(shut, 'layer')} depends on the base: strengths are those of the stored tensors"
        yield Finding("info", "needs-base", what, shut, "name the base: --base")


CHECKS: Sequence[Check] = (
    non_finite_tensors,
    unmatched_keys,
    dead_layers,
    exploding_layers,
    dora_axis,
    unread_kinds,
    misread_kinds,
    unread_names,
    missing_alpha,
    metadata_family,
    family_open,
    metadata_numbers,
    heavy_metadata,
    unknown_strengths,
    unused_rank,
    fp32_weights,
)


# ---------------------------------------------------------------- inside


def _groups(modules: Sequence[Module]) -> Mapping[tuple[str, str], Sequence[Module]]:
    """Layers that can be compared: matrices of the same part and kind."""
    groups: dict[tuple[str, str], list[Module]] = defaultdict(list)
    for module in modules:
        if len(module.shape) > 1:
            groups[part_of(module.path), module.kind].append(module)
    return groups


def _size(module: Module) -> float:
    """The root mean square of dW's entries."""
    return module.norm / math.sqrt(max(1, abs(math.prod(module.shape))))


def _largest_first(sizes: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(sorted(sizes, key=lambda path: -sizes[path]))


def _a1111(metadata: Mapping[str, str]) -> str:
    """What A1111 takes a file for; "" for anything."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1" if metadata else ""


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None  # "Dynamic", "None"
    return value if math.isfinite(value) else None


def _short_list(found: Mapping[int, int] | Mapping[float, int]) -> str:
    shown = [f"{value:g}" for value in list(found)[:4]]
    return ", ".join(shown) + (", ..." if len(found) > 4 else "")


def _count(things: Sequence[object] | Mapping[str, object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
