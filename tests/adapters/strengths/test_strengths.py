"""How much of an adapter, as people type it: parts, blocks, patterns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_adapters import make

from personalize.adapters.strengths.curves import curve, number
from personalize.adapters.strengths.grammar import PRESETS, block_of, blocks, names, split
from personalize.errors import AdapterError
from personalize.families import names as keys
from personalize.families.names import FAMILIES

points = st.lists(  # strength and position; jumps are in the table below
    st.tuples(st.floats(-2, 2), st.integers(0, 40).map(lambda i: i / 20)), min_size=1, max_size=6, unique_by=lambda p: p[1]
)
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
        ("a.safetensors:0@0,1@0.5:step=5-10", "0@0,1@0.5:start=5:stop=10"),
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


# ---------------------------------------------------------------- from step to step


@pytest.mark.parametrize(
    ("typed", "strengths"),
    [
        ("0@0,1@0.5,0@1", [0, 0.5, 1, 0.5, 0]),
        ("0@0,1", [0, 0.25, 0.5, 0.75, 1]),  # a point without a position is the end
        ("1@0.5,0@0", [0, 0.5, 1, 1, 1]),  # in any order, level outside
        ("1@0,1@0.5,0@0.5", [1, 1, 0, 0, 0]),  # a jump
        ("0@1,1@3", [0, 0, 0.5, 1, 1]),  # one position above 1: all are steps
        ("0.5:start=2", [0, 0, 0.5, 0.5, 0.5]),
        ("0.5:stop=2", [0.5, 0.5, 0, 0, 0]),
        ("0.5:start=1:stop=3", [0, 0.5, 0.5, 0, 0]),
        ("0.5:step=1-3", [0, 0.5, 0.5, 0, 0]),
        ("0.5:start=0.5", [0, 0, 0.5, 0.5, 0.5]),
        ("0.5:stop=0.5", [0.5, 0.5, 0, 0, 0]),
        ("0.5:stop=1", [0.5] * 5),
        ("0.5:step=0-1", [0.5] * 5),
        ("0@0,1@1:start=0.25:stop=0.75", [0, 0.25, 0.5, 0, 0]),
        ("0.5", [0.5] * 5),
    ],
)
def test_strengths_from_step_to_step(typed: str, strengths: list[float]) -> None:
    _, weighting = split(f"a.safetensors:{typed}")
    assert [weighting.at(step, 5).parts["unet"] for step in range(5)] == pytest.approx(strengths)
    assert not weighting.at(0, 5).moves and weighting.moves == (typed != "0.5")


@given(points, st.integers(1, 30))
def test_curves_are_numpys_interpolation(drawn: list[tuple[float, float]], steps: int) -> None:
    """sd-webui-loractl: np.interp over shares, or over steps where the last position is above 1."""
    made = curve(",".join(f"{number(strength)}@{number(position)}" for strength, position in drawn))
    ys, xs = zip(*sorted(drawn, key=lambda point: point[1]), strict=True)
    for step in range(steps):
        here = step if xs[-1] > 1 else step / max(1, steps - 1)
        assert made.at(step, steps) == pytest.approx(np.interp(here, xs, ys), abs=1e-9)


def test_parts_go_their_own_ways() -> None:
    _, weighting = split("a.safetensors:unet=0@0,1@1:te=0.5:lbw=MID")
    assert weighting.at(1, 3).parts == dict.fromkeys(keys.PARTS, 0.5)
    assert weighting.at(1, 3).blocks == "MID"


def test_a_schedule_where_nothing_is_drawn_is_refused() -> None:
    for typed in ("0@0,1@1", "1:stop=5"):
        with pytest.raises(AdapterError, match="changes from step to step"):
            make("sd1", "mid_block").weighted(split(f"a.safetensors:{typed}")[1])
