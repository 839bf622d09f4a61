"""Real Chromium in the room Dataset: a captioner is chosen, watched, cancelled, and what it wrote is edited."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from captioners import build_classifier
from servers import Service, png, wait

from tools.pocket.world import Scene, render


@pytest.fixture
def folder(studio: Service, request: pytest.FixtureRequest) -> Path:
    """A dataset of drawings of pocket's world, one of which has a caption."""
    (made := studio.root / "datasets" / request.node.name.replace("_", "-")[:30]).mkdir()
    for number, thing in enumerate(("cat", "car", "flower")):
        render(Scene(thing, "red", "large", "middle", "beach", "ink", 3 + number), 96).save(made / f"{number}.png")
    (made / "2.txt").write_text("by hand\n")
    return made


def captions_of(page: Any) -> list[str]:
    return [page.input_value(f"#caption-{number}") for number in (1, 2, 3)]


def test_a_captioner_fills_the_empty_captions_and_then_all(page: Any, studio: Service, folder: Path) -> None:
    page.goto(f"/dataset/{folder.name}")
    page.wait_for_selector(".frame")
    assert captions_of(page) == ["", "", "by hand"]
    page.click("text=Let a model write captions")
    assert page.input_value("#captioner-model") == "pocket" and "pip install onnxruntime" in page.inner_text(".captioner")
    assert f"{{trigger}} is {folder.name}" in page.inner_text(".captioner")
    page.fill("#captioner-trigger", "zwx")
    page.click("#caption-them")
    page.wait_for_selector("#captioning:has-text('2 captions written')")
    wait(lambda: captions_of(page), lambda found: all(found), 60)  # they come by themselves, while they are looked at
    found = captions_of(page)
    assert found[0] == "zwx, a red cat on the beach, ink drawing" and found[2] == "by hand"
    assert [(folder / f"{number}.txt").read_text().strip() for number in range(3)] == found
    assert "1 kept as they were" in page.inner_text("#captioning")
    page.fill("#caption-1", "zwx, mine")
    page.press("#caption-1", "Tab")
    page.wait_for_selector("output:has-text('saved')")
    page.select_option("#captioner-which", "all")
    page.fill("#captioner-prefix", "")
    page.click("#caption-them")
    wait(lambda: captions_of(page), lambda found: found[0].startswith("a red cat") and "hand" not in found[2], 60)
    job = studio.studio.store.list(kinds=("caption",))[0]
    assert job.settings["overwrite"] is True and job.settings["prefix"] == "" and job.state == "succeeded"
    page.reload()
    assert "captions written" in page.text_content("#captioning")


MANY = 600  # captions take longer than a busy browser takes to press a button


def test_a_captioner_is_watched_and_cancelled(page: Any, studio: Service, folder: Path, tmp_path: Path) -> None:
    for number in range(3, MANY):
        (folder / f"{number}.png").write_bytes(png(32, (number % 256, 90, 90)))
    tagger = build_classifier(studio.root / "tagger", ["cat", "dog"])
    page.goto(f"/dataset/{folder.name}")
    page.click("text=Let a model write captions")
    page.fill("#captioner-model", str(tagger))
    page.click("#caption-them")
    page.wait_for_selector("#captioning progress[value]")
    wait(lambda: page.inner_text("#captioning"), re.compile(rf"\b[1-9]\d* of {MANY - 1}").search, 60)
    page.click("#captioning >> text=Cancel")
    page.wait_for_selector("#captioning:has-text('Cancelled')")
    written = len(list(folder.glob("*.txt")))
    assert 1 < written < MANY and studio.studio.store.list(kinds=("caption",))[0].state == "cancelled"
    page.click("#caption-them")  # goes on with those that are empty
    page.wait_for_selector(f"#captioning:has-text('{MANY - written} captions written')", timeout=240_000)
    assert len(list(folder.glob("*.txt"))) == MANY


def test_what_cannot_caption_is_told_beside_the_form(page: Any, studio: Service, folder: Path) -> None:
    page.goto(f"/dataset/{folder.name}")
    page.click("text=Let a model write captions")
    page.fill("#captioner-model", "/etc")
    page.click("#caption-them")
    page.wait_for_selector("#toast .note:has-text('outside of the workspace')")
    page.fill("#captioner-model", "nowhere")
    page.click("#caption-them")
    page.wait_for_selector("#toast .note:has-text('no captioner called')")
    page.fill("#captioner-model", "someone/model")  # the hub is asked by the job: it is offline here
    page.click("#caption-them")
    page.wait_for_selector("#captioning .note.bad:has-text('HF_HUB_OFFLINE')")
    page.faults[:] = [one for one in page.faults if not any(code in one for code in ("403", "400"))]


def test_an_answer_that_comes_late_is_not_the_last_word(page: Any, studio: Service, folder: Path) -> None:
    """The job is over before the browser hears that it was queued."""
    page.goto(f"/dataset/{folder.name}")
    page.click("text=Let a model write captions")
    held: list[Any] = []
    page.route("**/captioning", lambda route: held.append(route) if route.request.method == "POST" else route.continue_())
    page.click("#caption-them")
    wait(lambda: page.evaluate("0") or held, bool, 60)
    answer = held[0].fetch()
    page.wait_for_selector("#captioning:has-text('captions written')")
    held[0].fulfill(response=answer)
    page.wait_for_timeout(500)
    assert "captions written" in page.inner_text("#captioning")


@pytest.mark.parametrize("width", [390, 1400])
def test_the_form_fits(page: Any, folder: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"/dataset/{folder.name}")
    page.click("text=Let a model write captions")
    page.click("#caption-them")
    page.wait_for_selector("#captioning:has-text('captions written')")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
