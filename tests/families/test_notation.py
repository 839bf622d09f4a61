r"""What stands in prompts beside words: escapes, choices, edits by step, and what other programs read, told by name."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalize.families.notation import (
    at_step,
    choose_by_seed,
    escape,
    foreign,
    has_edits,
    plain_text,
    settle,
    unescape,
    variants,
)

# AUTOMATIC1111's own examples of prompt_parser.py, at ten steps: (prompt, [(last step, text)])
A1111 = [
    ("test", [(10, "test")]),
    ("a [b:3]", [(3, "a "), (10, "a b")]),
    ("a [b: 3]", [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", [(10, "a [unbalanced")]),
    ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("[a|(b:1.1)]", [(i, "(b:1.1)" if i % 2 == 0 else "a") for i in range(1, 11)]),
    ("[fe|]male", [(i, "male" if i % 2 == 0 else "female") for i in range(1, 11)]),
    ("[fe|||]male", [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")]),
    ("a [cat::0.3] b", [(3, "a cat b"), (10, "a  b")]),
    (r"a \[b:c:3\] [x]", [(10, r"a \[b:c:3\] [x]")]),
]


@pytest.mark.parametrize(("prompt", "said"), A1111)
def test_prompts_are_edited_as_a1111_schedules_them(prompt: str, said: list[tuple[int, str]]) -> None:
    found = [(step, at_step(prompt, step, 10)) for step in range(1, 11)]
    assert [list(some)[-1] for _, some in groupby(found, key=lambda pair: pair[1])] == said
    assert has_edits(prompt) == (len(said) > 1)


@given(st.text(st.sampled_from("ab ()[]{}\\|:,5.")))
def test_text_that_was_escaped_is_read_as_that_text(text: str) -> None:
    words = " ".join(text.split())
    assert plain_text(escape(words)) == words and unescape(escape(words)) == words
    assert variants(escape(words)) == [escape(words)] and not has_edits(escape(words))


@given(st.text(st.sampled_from("ab ()[]{}\\|:,5.")))
def test_any_text_can_be_read_at_any_step(text: str) -> None:
    assert isinstance(at_step(text, 1, 3), str) and isinstance(settle(text), str)


def test_choices_are_all_made_and_the_same_for_a_seed() -> None:
    text = "a {red|{dark|light} blue|} {cat|dog}"
    assert set(variants(text)) == {f"a {x} {y}" for x in ("red", "dark blue", "light blue", "") for y in ("cat", "dog")}
    assert len({choose_by_seed(text, seed) for seed in range(50)}) == 8 and choose_by_seed(text, 7) == choose_by_seed(text, 7)
    assert 32 < len(variants("{a|b|c|d}" * 9)) <= 64
    assert variants(r"a \{b|c\}") == [r"a \{b|c\}"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red cat AND a blue dog", "AND"),
        ("a __animal__", "wildcards"),
        ("{2$$red|blue}", "a choice with numbers"),
        ("{{masterpiece}}, a cat", "a word in braces"),
        ("embedding:easynegative", "an embedding"),
        ('("a cat", "a dog").blend(0.5, 0.5)', "InvokeAI"),
    ],
)
def test_what_is_not_read_is_told_by_name(prompt: str, name: str) -> None:
    assert any(name in told for told, _ in foreign(prompt))


def test_usual_prompts_are_not_complained_about() -> None:
    usual = [
        "a (red:1.2) [old] cat, ANDES and SAND",
        "my_file__name",
        "{red|blue} cat",
        "a {trigger} {class}",
        r"\{x\}",
        "it's :( 5:30",
    ]
    assert [list(foreign(prompt)) for prompt in usual] == [[]] * len(usual)
