"""A1111's prompt syntax: what people type in the wild, and that every tag means what --adapter means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalize.adapters.strengths.curves import Curve, Window
from personalize.adapters.strengths.grammar import PARTS, Weighting, every_part, split
from personalize.errors import RecipeError
from personalize.inference.prompts import find_name, parse, tag, with_tags

WILD = [  # tag, the same behind a file's name
    ("<lora:rex>", ""),
    ("<lora:rex:0.8>", ":0.8"),
    ("<LORA:rex:.8>", ":0.8"),
    ("<lyco:rex:-1>", ":-1"),
    ("<lora:rex:0.5:0.8>", ":0.8:0.5"),
    ("<lora:rex:te=0.5>", ":0.5"),
    ("<lora:rex:1:te=0.5>", ":0.5"),
    ("<lora:rex:1:unet=0.5>", ":unet=0.5:te=1"),
    ("<lora:rex:unet=0.5>", ":unet=0.5:te=1"),
    ("<lora:rex:0.5:0.8:te2=0>", ":unet=0.8:te=0.5:te2=0"),
    ("<lora:rex:1:lbw=OUTD>", ":lbw=OUTD"),
    ("<lora:rex:1:1:lbw=OUTD>", ":lbw=OUTD"),
    ("<lora:rex:1:OUTD>", ":lbw=OUTD"),
    ("<lora:rex:1:1,0,0,0,1,1,1,0,0,0,0,0>", ":lbw=1,0,0,0,1,1,1,0,0,0,0,0"),
    ("<lora:rex:0.8:start=10:stop=20>", ":0.8:start=10:stop=20"),
    ("<lora:rex:0.8:step=5-10>", ":0.8:start=5:stop=10"),
    ("<lora:rex:1:lbw=IN02+MID:stop=0.5:*attn2*=0.5>", ":lbw=IN02+MID:*attn2*=0.5:stop=0.5"),
    ("<lora:rex:0@0,1@0.5,0@1>", ":0@0,1@0.5,0@1"),
    ("<lora:rex:0~0;1~0.5;0>", ":0@0,1@0.5,0@1"),
    ("<lora:rex:te=0@0,1@1:unet=1>", ":unet=1:te=0@0,1@1"),
    ("<lora:rex : 0.8>", ":0.8"),
]


@pytest.mark.parametrize(("written", "behind"), WILD, ids=[tag for tag, _ in WILD])
def test_a_tag_says_what_the_command_line_says(written: str, behind: str) -> None:
    ((name, weighting),) = parse(f"a {written} dog").uses
    assert name == "rex"
    assert weighting == split(f"rex.safetensors{behind}")[1]
    assert parse(tag(name, weighting)).uses == ((name, weighting),)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a <lora:rex:1> dog", "a dog"),
        ("<lora:rex:1>a dog", "a dog"),
        ("a dog <lora:rex:1><lora:ink:1>", "a dog"),
        ("a dog <lora:rex:1>, in the snow", "a dog, in the snow"),
        ("a (dog:1.2) [[house]]  <lora:rex:1>", "a (dog:1.2) [[house]]"),
        ("a  dog < 3 <b>", "a  dog < 3 <b>"),
        ("", ""),
    ],
)
def test_the_text_encoder_reads_the_rest(prompt: str, text: str) -> None:
    assert parse(prompt).text == text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:rex:0.8 dog", "a tag is not closed: <lora:rex:0.8 dog"),
        ("<lora::1>", "names no adapter"),
        ("<lora:rex:much>", "'much' says no strength"),
        ("<lora:rex:1:1:1>", "too many strengths"),
        ("<lora:rex:1:dyn=8>", "dyn= is not supported .*resize"),
        ("<lora:rex:1:lbw=OUTD:lbwe=IN01>", "lbwe= is not supported"),
        ("<hypernet:rex:1>", "hypernetworks are not supported"),
        ("<lora:rex:1:start=10:stop=5>", "start=10 is not before stop=5"),
        ("<lora:rex:1:start=0.5:stop=5>", "start=0.5 is a share and stop=5 a step"),
        ("<lora:rex:1@-1>", "position below 0"),
        ("<lora:rex:nan>", "says no strength"),
    ],
)
def test_what_says_nothing_is_refused_by_name(prompt: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(prompt)


def test_names_are_found_in_any_case_and_the_nearest_is_named() -> None:
    assert find_name("rex", ["Rex", "rex"]) == "rex"
    assert find_name("REX", ["ink", "Rex"]) == "Rex"
    with pytest.raises(RecipeError, match=r"no adapter is called 'rxe' \(did you mean rex\?\)"):
        find_name("rxe", ["ink", "rex"])


numbers = st.floats(-8, 8, allow_nan=False).map(lambda value: value + 0.0)  # no -0
places = st.floats(0, 40, allow_nan=False).map(lambda value: value + 0.0)
curves = st.lists(st.tuples(places, numbers), min_size=1, max_size=5).map(
    lambda points: Curve(tuple(sorted(points, key=lambda point: point[0])))
)
strengths = st.one_of(numbers, curves)
windows = st.one_of(
    st.just(Window()),
    st.tuples(st.integers(0, 9), st.integers(10, 50)).map(lambda ends: Window(*map(float, ends))),
    st.tuples(st.floats(0, 0.5, exclude_max=True), st.floats(0.5, 1)).map(lambda ends: Window(*ends)),
)
weightings = st.builds(
    Weighting,
    st.fixed_dictionaries(dict.fromkeys(PARTS.values(), strengths)).map(every_part),
    st.sampled_from(["", "OUTD", "MID+OUT03", "1,0,0.5"]),
    st.dictionaries(st.sampled_from(["*attn2*", "*.ff.*", "unet.*"]), numbers, max_size=2).map(lambda rows: tuple(rows.items())),
    windows,
)


@given(weightings)
def test_every_weighting_can_be_written_and_read_again(weighting: Weighting) -> None:
    assert split(f"rex.safetensors:{weighting}") == ("rex.safetensors", weighting)
    text, uses = parse(with_tags("a dog", [("rex", weighting), ("ink", weighting)]))  # type: ignore[list-item]
    assert (text, uses) == ("a dog", (("rex", weighting), ("ink", weighting)))
