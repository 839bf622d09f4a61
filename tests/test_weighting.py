"""How much of an adapter, as people type it: parts, blocks, patterns."""

from __future__ import annotations

import pytest

from personalize.adapters import FAMILIES, keys
from personalize.adapters.weighting import PRESETS, block_of, blocks, names, split
from personalize.errors import AdapterError
from tests.test_adapters import make

ROWS = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("a.safetensors", "1"),
        ("a.safetensors:0.8", "0.8"),
        ("a.safetensors:-0.5:1", "-0.5:1"),
        ("a.safetensors:unet=1:te=0.5:te2=0", "unet=1:te=0.5:te2=0"),
        ("a.safetensors:lbw=MID+OUT03:0.5", "0.5:lbw=MID+OUT03"),
        ("a.safetensors:0.8:*attn2*=0.5:*ff*=0", "0.8:*attn2*=0.5:*ff*=0"),
        ("a.safetensors:0.123456789:-0.00001", "0.123456789:-0.00001"),
    ],
)
def test_what_was_typed_is_told_again(typed: str, said: str) -> None:
    path, weighting = split(typed)
    assert (path, str(weighting)) == ("a.safetensors", said)
    assert split(f"{path}:{weighting}") == (path, weighting)


def test_lists_in_the_wild_are_those_of_the_families() -> None:
    """sd-webui-lora-block-weight: 17 and 26 blocks of SD, 12 and 20 of SDXL."""
    short = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    assert names(ROWS["sd1"], attention=True) == names(ROWS["sd2"], attention=True) == tuple(short.split())
    assert names(ROWS["sdxl"], attention=True) == tuple(
        ["BASE", "IN04", "IN05", "IN07", "IN08", "MID", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"]
    )
    assert (len(names(ROWS["sd1"])), len(names(ROWS["sdxl"]))) == (26, 20)
    assert all(len(preset) == 17 for preset in PRESETS.values())


@pytest.mark.parametrize("family", ROWS)
def test_every_layer_has_one_block(family: str) -> None:
    row = ROWS[family]
    found = {block_of(row, path) for path in keys.weights(row)}
    assert found == set(names(row))
    assert {block_of(row, path) for path in keys.weights(row) if path.startswith("text_encoder")} == {"BASE"}


def test_strengths_by_part_block_and_pattern_multiply() -> None:
    a = make("sd1", "transformer_blocks.0.attn", alpha=2.0)
    _, weighting = split("a.safetensors:0.5:lbw=MID+OUT03:*attn2*=0.5")
    weighted = a.weighted(weighting)
    assert {block_of(ROWS["sd1"], path) for path in weighted.deltas} == {"MID", "OUT03"}
    for path, delta in weighted.deltas.items():
        assert delta.norm() == pytest.approx(a.deltas[path].norm() * (0.25 if "attn2" in path else 0.5), rel=1e-5)


def test_a_list_of_numbers_goes_to_the_blocks_in_order() -> None:
    assert blocks(",".join(map(str, range(12))), ROWS["sdxl"])["OUT05"] == 11
    assert blocks(",".join(map(str, range(12))), ROWS["sdxl"])["IN00"] == 0  # has no attention: not in the short list
    assert blocks(",".join(map(str, range(20))), ROWS["sdxl"])["OUT08"] == 19
    assert blocks("outd", ROWS["sd1"]) == blocks("1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0", ROWS["sd1"])
    assert blocks("in2", ROWS["sd1"]) == dict.fromkeys(names(ROWS["sd1"]), 0.0) | {"IN02": 1.0}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a.safetensors:lbw=1,2,3", "17 or 26 numbers"),
        ("a.safetensors:lbw=OUT12", "no block OUT12.*did you mean OUT"),
        ("a.safetensors:*nothing*=1", "matches no layer"),
    ],
)
def test_what_a_family_does_not_have_is_named(typed: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make("sd1", "mid_block").weighted(split(typed)[1])
