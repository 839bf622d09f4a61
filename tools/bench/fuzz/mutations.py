"""Ways to break a file. Those in DRAFTS change what a file holds, and all its lengths stay right; those in BYTES make it lie."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

from personalize.adapters import kinds
from personalize.formats.header import ITEM_SIZES

from .sources import FLOATS, Draft, Stored, make_tensor, number, pack, size_of

NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63, 2**64, 2**70, 1.5, 1e300, "", "F32", "I8", "F4"),
    *("\0", [], [0], [1], [2, 2], [2**40, 2**40], [-1, 1], [[1]], [1] * 99, {}, {"a": {}}, [True, 2], [2.0, 2], ["2", 2]),
)
NUMBERS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, -1e-40, 1e-300, 1e30, 3e38, -3e38, 65504.0, 1e300, 5e-324)
SIDES = (0, 1, 1, 2, 3, 4, 5, 8, 16, 100, 1000, 20_000)
TEXTS = (
    *(
        "",
        "\0",
        "\x1b[2J\x1b[31m",
        "a\nb\r\nc\u2028d",
        "\ud800",
        "\u202egnp",
        "x" * 100_000,
        "[" * 50_000,
        "{}",
        "[]",
        "null",
        "NaN",
    ),
    *("Infinity", "-1", "1e999", "9" * 5000, "0x10", "Dynamic", '{"a": NaN}', '{"a": {"b": 1e999}}', '{"a": {"b": NaN}}', "True"),
    *(
        '{"a": {"b": "2"}}',
        '{"a": [1]}',
        '[{"a": 1}]',
        "sd_v1-5",
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base/lora",
        "<script>",
    ),
    *("data:image/png;base64,AAAA", "../../etc/passwd", '{"model": {"base": "x"}}', '{"version": 99}', "'; DROP TABLE x; --"),
)
SAID = (
    *("ss_tag_frequency", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "modelspec.architecture", "ss_v2"),
    *("modelspec.title", "modelspec.trigger_phrase", "modelspec.thumbnail", "modelspec.description", "personalize.recipe"),
    *("personalize.merge", "ss_output_name", "lora_adapter_metadata", "format", "", "\x1b[31m"),
)
PATTERNS: tuple[Any, ...] = (
    *(None, [], "x", {}, {"to_q": 4}, {"^unet": 1}, {"(a+)+$": 4}, {"": 1}, {"\n": 1}, {".": 2}, {"to_q": []}),
    *({"to_q": "4"}, {"to_q": 0}, {"attn1.to_q": -1}, {"to_q": 1e40}, {"x" * 9999: 1}, {f"m{i}": i for i in range(300)}),
)
SETTINGS: tuple[Any, ...] = (
    *(None, True, "4", 0, -1, 4, 1e-300, 1e29, 1e31, 2**70, 2**2000, math.nan, math.inf, -math.inf, [], {}, "\x1b[31m\n"),
    *("lora_\x1b[31m\nx", "pissa_niter_4", "gaussian", [[]], "x" * 99_999),
)
DISGUISES = (
    *(
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x05",
        b"\x80\x04\x95\x0f\0\0\0\0\0\0\0}\x94\x8c\x01a\x94]\x94s.",
        b"<!DOCTYPE html>",
        b"\x89PNG\r\n\x1a\n",
        b"GGUF",
    ),
    *(b"version https://git-lfs.github.com/spec/v1\n", b"\xef\xbb\xbf", b"{", b"\0" * 8, b"\x93NUMPY", b"\x1f\x8b", b"Rar!"),
)
LENGTHS = (0, 1, 2, 8, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)

OnDraft = Callable[[random.Random, Draft], None]
OnBytes = Callable[[random.Random, bytes], bytes]


def _key(draw: random.Random, draft: Draft) -> str:
    return draw.choice(list(draft.tensors))


# ---------------------------------------------------------------- what a file holds


def roles(draw: random.Random, draft: Draft) -> None:
    """A key takes another role, module, prefix or spelling; or it goes; or it stands twice, under two names."""
    key = _key(draw, draft)
    stem, _, role = key.partition(".")
    other = draw.choice(sorted(kinds.roles()))
    made = draw.choice([
        *(f"{stem}.{other}", f"{_key(draw, draft).partition('.')[0]}.{role}", f"{stem}.{role}.weight", f"unet.x.{role}"),
        *(key.replace("lora_unet", "lora_te2"), key.replace("_0_", "_9_"), key + "x", key[1:], "", ".", f"..{key}", f"{key}\n"),
        *(f"\x1b[31m{key}", f"{stem}.alpha", f"text_encoder.{key}", f"base_model.model.{key}", key.replace(".", "")),
        *(f"unet.{'a.' * 2000}lora_A.weight", key.replace("text_model_", ""), key.replace("unet.", "")),
        *(f"{key}\ud800", "emb_params", "x" * 50_000),
    ])  # fmt: skip
    choice = draw.randrange(4)
    if choice == 0 and len(draft.tensors) > 1:
        del draft.tensors[key]
    elif choice == 1:
        draft.tensors[made] = draft.tensors[key]
    elif made not in draft.tensors:
        draft.tensors = {made if name == key else name: one for name, one in draft.tensors.items()}


def reshape_tensor(draw: random.Random, draft: Draft) -> None:
    """A tensor of another shape, with all its numbers there: no, more or larger sides, another order."""
    key = _key(draw, draft)
    one = draft.tensors[key]
    made = list(one.shape)
    choice = draw.randrange(6)
    if choice == 0:
        made = made[1:] if draw.random() < 0.5 else made[:-1]
    elif choice == 1:
        made.insert(draw.randrange(len(made) + 1), draw.choice((0, 1, 1, 2)))
    elif choice == 2:
        made.reverse()
    elif choice == 3:
        made = [1] * draw.randrange(9)
    elif made:
        made[draw.randrange(len(made))] = draw.choice(SIDES)
    _set(draw, draft, key, tuple(made))


def huge(draw: random.Random, draft: Draft) -> None:
    """Factors of a few bytes that claim much: the long side of every tensor grows, or the side that factors share."""
    far, near = draw.choice(((20_000, 1), (8_000, 1), (1, 3_000), (1, 300), (700, 20), (300, 1)))
    for key, one in list(draft.tensors.items()):
        if len(one.shape) >= 2 and not draft.hole:
            down = any(key.endswith(end) for end in ("_b", "down.weight", "A.weight", "2.weight"))
            made = (near, far) if down else (far, near)
            _set(draw, draft, key, (*made, *one.shape[2:]) if "mid" not in key else (near, near, *one.shape[2:]))


def _set(draw: random.Random, draft: Draft, key: str, shape: tuple[int, ...]) -> None:
    """Bounded: the fuzzer itself must not write large files."""
    one = draft.tensors[key]
    if size_of(one.dtype, shape) <= 1 << 20 and not draft.hole:
        draft.tensors[key] = make_tensor(draw, one.dtype, shape)
    elif draft.hole:
        draft.tensors[key] = Stored(one.dtype, shape, b"")
        draft.hole = min(1 << 40, sum(size_of(each.dtype, each.shape) for each in draft.tensors.values()))


def change_dtypes(draw: random.Random, draft: Draft) -> None:
    """One or all tensors in another dtype, also of integers, with as many bytes as it needs."""
    dtype = draw.choice([*FLOATS, *ITEM_SIZES])
    for key in list(draft.tensors) if draw.random() < 0.3 else [_key(draw, draft)]:
        one = draft.tensors[key]
        draft.tensors[key] = Stored(dtype, one.shape, b"") if draft.hole else make_tensor(draw, dtype, one.shape)
    draft.hole = draft.hole and sum(size_of(each.dtype, each.shape) for each in draft.tensors.values())


def fill_values(draw: random.Random, draft: Draft) -> None:
    """Tensors of one number throughout: NaN, infinity, none, the smallest, the largest."""
    value = draw.choice(NUMBERS)
    for key in list(draft.tensors) if draw.random() < 0.5 else [_key(draw, draft)]:
        one = draft.tensors[key]
        if one.data and one.dtype in ("F64", "F32", "F16"):
            draft.tensors[key] = number(value, one.dtype, one.shape)


def alphas(draw: random.Random, draft: Draft) -> None:
    """An alpha, or another number that must be one, out of bounds or of several."""
    stem = _key(draw, draft).partition(".")[0]
    role = draw.choice(["alpha", "alpha", "on_input", "dora_scale", "rescale"])
    shape = draw.choice([(), (), (), (1,), (1, 1), (2,), (0,)])
    draft.tensors[f"{stem}.{role}"] = number(draw.choice(NUMBERS), draw.choice(["F64", "F64", "F32", "F16"]), shape)


def metadata(draw: random.Random, draft: Draft) -> None:
    """What a file says about itself."""
    if draw.random() < 0.2:
        draft.metadata = draw.choice([*NASTY, {"a": 1}, {"a": None}, ["a"], {"a": ["b"]}, {str(i): "x" for i in range(5000)}])
    elif isinstance(draft.metadata, dict):
        draft.metadata |= {draw.choice(SAID): draw.choice(TEXTS) for _ in range(draw.randrange(1, 4))}


def config(draw: random.Random, draft: Draft) -> None:
    """The LoraConfig of diffusers and peft."""
    if draw.random() < 0.2:
        text = draw.choice(TEXTS)
    else:
        names = ("r", "lora_alpha", "alpha", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")
        table = {"lora_alpha": 4} | {
            name: draw.choice(PATTERNS if "pattern" in name else SETTINGS) for name in draw.sample(names, 3)
        }
        part = draw.choice(["unet.", "text_encoder.", ""])
        text = json.dumps({f"{part}{name}": value for name, value in table.items()})
    if isinstance(draft.metadata, dict):
        draft.metadata["lora_adapter_metadata"] = text


# ---------------------------------------------------------------- what its bytes say


def flip_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Noise over, between or instead of some bytes, half of the time in the header."""
    whole = len(raw) if draw.random() < 0.5 else min(len(raw), 8 + int.from_bytes(raw[:8], "little"))
    at, noise = draw.randrange(max(1, whole)), draw.randbytes(draw.randrange(1, 9))
    spread = bytearray(raw)
    for _ in range(draw.randrange(1, 4) if raw else 0):
        spread[draw.randrange(max(1, whole))] ^= 1 << draw.randrange(8)
    return draw.choice(
        [bytes(spread), raw[:at] + noise + raw[at:], raw[:at] + noise + raw[at + len(noise) :], raw[:at] + raw[at + len(noise) :]]
    )


def length(draw: random.Random, raw: bytes) -> bytes:
    """Another length of the header."""
    known = int.from_bytes(raw[:8], "little")
    made = draw.choice(
        [*LENGTHS, len(raw), len(raw) - 8, len(raw) - 7, known + draw.randrange(-20, 20), draw.randrange(2 * known + 1)]
    )
    return min(max(made, 0), 2**64 - 1).to_bytes(8, "little") + raw[8:]


def truncate(draw: random.Random, raw: bytes) -> bytes:
    """Cut off anywhere."""
    return raw[: draw.randrange(min(len(raw), 64) if draw.random() < 0.2 else len(raw) or 1)]


def append_bytes(draw: random.Random, raw: bytes) -> bytes:
    """More bytes than the header knows of."""
    return raw + draw.choice([b"\0", draw.randbytes(draw.randrange(1, 99)), raw, bytes(65_536), *DISGUISES])


def disguise(draw: random.Random, raw: bytes) -> bytes:
    """Another format's first bytes, before or instead of its own, or at the place where the header begins."""
    mark = draw.choice(DISGUISES)
    return draw.choice([mark + raw, mark + raw[len(mark) :], raw[:8] + mark + raw[8 + len(mark) :], mark])


def _table(raw: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def entries(draw: random.Random, raw: bytes) -> bytes:
    """Dtypes, shapes and offsets that lie: of another type, zero, huge, negative, fractions, truths, overlaps and gaps."""
    table, data = _table(raw)
    names = [key for key in table if key != "__metadata__"]
    key, other = draw.choice(names), draw.choice(names)
    field = draw.choice(["dtype", "shape", "data_offsets"])
    choice = draw.randrange(8)
    if choice == 0:
        table[key][field] = draw.choice(NASTY)
    elif choice == 1:
        sides = table[key][draw.choice(["shape", "data_offsets"])] or [0]
        sides[draw.randrange(len(sides))] = draw.choice(NASTY)
    elif choice == 2:
        table[key], table[other] = table[other], table[key]
    elif choice == 3:
        table[key]["data_offsets"] = table[other]["data_offsets"]
    elif choice == 4:
        table[key] = draw.choice([*NASTY, table[key] | {"more": 1}, {name: table[key][name] for name in ("dtype", "shape")}])
    elif choice == 5:
        shift = draw.choice([-8, -4, -1, 1, 4, 8, 2**40])
        table[key]["data_offsets"] = [place + shift for place in table[key]["data_offsets"]]
    elif choice == 6:
        table[key]["dtype"] = draw.choice(list(ITEM_SIZES))
    else:
        table[key]["shape"] = draw.choice(
            [table[key]["shape"][::-1], [math.prod(table[key]["shape"])], [*table[key]["shape"], 1]]
        )
    return pack(table, data)


def text(draw: random.Random, raw: bytes) -> bytes:
    """JSON that is none, or not what it seems: keys twice, deep, endless, of other encodings, with more behind."""
    table, data = _table(raw)
    key = draw.choice([name for name in table if name != "__metadata__"])
    said, depth = json.dumps(table), draw.choice([10, 900, 5_000, 200_000])
    twice = json.dumps({key: table[key]})[1:-1]
    deep = "[" * depth + "]" * depth
    made = draw.choice([
        *(f"{said[:-1]}, {twice}}}", f"{{{twice}, {said[1:]}", f'{said[:-1]}, "__metadata__": {{}}, "__metadata__": {{}}}}'),
        *(f'{said[:-1]}, "a": {deep}}}', said.replace("F32", deep, 1), said.replace('"F32"', deep, 1)),
        *(f'{said[:-1]}, "a": {"9" * 9999}}}', f'{said[:-1]}, "\\u0000": {deep}}}', "null"),
        *(said + " " * draw.randrange(99), said + "x", " " + said, said[:-1], said + said, said.replace(":", " :"), "{}", "[]"),
        *(said.replace('"shape"', '"sh\\u0061pe"'), said.replace('"', "'"), said.replace("0", "0.0", 1)),
        *(said.replace("[", "[-", 1), said.replace(key, "\\ud800" + key), "{" * depth),
        *(f'{said[:-1]}, "a": NaN}}', said.replace(key, "\\u001b[31m\\n" + key)),
        *(f'{said[:-1]}, "{key}": {{"dtype": {deep}, "shape": [], "data_offsets": [0, 0]}}}}',),
    ])  # fmt: skip
    coding = draw.choice(["utf-8"] * 6 + ["utf-16", "utf-32", "utf-8-sig"])
    return pack(made.encode(coding, "replace"), data)


DRAFTS: Mapping[str, OnDraft] = {
    "roles and names": roles,
    "shapes, all there": reshape_tensor,
    "huge claims": huge,
    "dtypes": change_dtypes,
    "values": fill_values,
    "alphas": alphas,
    "metadata": metadata,
    "LoraConfig": config,
}
BYTES: Mapping[str, OnBytes] = {
    "bytes flipped": flip_bytes,
    "header length": length,
    "truncated": truncate,
    "appended": append_bytes,
    "disguised": disguise,
    "entries that lie": entries,
    "JSON": text,
}
REPLACED, SEVERAL, SOUND = "replaced while read", "several at once", "none"
NAMES = (*DRAFTS, *BYTES, REPLACED, SEVERAL, SOUND)


def mutate(draw: random.Random, draft: Draft, names: tuple[str, ...]) -> bytes:
    """The bytes of a file with these mutations, in order; those of bytes come last."""
    for name in names:
        if name in DRAFTS and draft.tensors:
            DRAFTS[name](draw, draft)
    raw = pack(draft.header(), draft.data())
    for name in names:
        if name in BYTES and len(raw) > 16:
            try:
                raw = BYTES[name](draw, raw)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # the one before has left no header to lie in
    return raw


def choose_mutations(draw: random.Random, name: str) -> tuple[str, ...]:
    """The mutations that make up one: itself, or up to four."""
    if name == SEVERAL:
        return tuple(draw.choices([*DRAFTS, *BYTES], k=draw.randrange(2, 5)))
    return (name,)
