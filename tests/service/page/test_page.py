"""Real Chromium at a real server: from sample pictures to an adapter in an image UI's folder, and a path through each room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import Service, wait

LEAST = {"rank": "2", "resolution": "32", "batch_size": "1", "checkpoint_every": "0", "choose": "none", "prior": "none",
         "targets": "self-attention", "sample_every": "0", "sample_prompts": "{trigger} cat", "sample_seeds": "0",
         "sample_steps": "1"}  # fmt: skip
ROOMS = ("/", "/dataset", "/compare", "/library", "/mix", "/jobs")


@pytest.fixture(scope="session")
def trained(chromium: Any, studio: Service) -> str:
    """A training, begun on the page as somebody does who has no pictures at hand; its id."""
    page = chromium.new_context(base_url=studio.address).new_page()
    clicks = 0

    def click(selector: str) -> None:
        nonlocal clicks
        clicks += 1
        page.click(selector)

    page.goto("/")
    click("#sample-subject")
    page.wait_for_selector("#f-steps")
    assert page.input_value("#f-trigger") == "zwx" and page.input_value("#f-class") == "cat"
    assert page.is_checked("[value=pocket-subject]") and "content" in page.inner_text(".coach")
    page.evaluate("document.querySelector('#others').open = true")  # to be quick; nobody has to
    for name, value in LEAST.items():
        field = f"#f-{name}"
        is_choice = page.eval_on_selector(field, "one => one.tagName") == "SELECT"
        page.select_option(field, value) if is_choice else page.fill(field, value)
    page.evaluate("document.querySelector('#f-steps').value = 5000")
    click(".train")
    page.wait_for_url("**/jobs/*")
    assert clicks <= 3
    until(page, "/of 5000/.test(document.querySelector('.figures').innerText)")
    until(page, "document.querySelectorAll('.curve path.line').length === 1")
    page.click("button:has-text('Sample now')")
    until(page, "document.querySelectorAll('#growth img').length === 2")  # the base's, and that of a step
    until(page, "[...document.querySelectorAll('#growth img')].every(one => one.naturalWidth > 0)")
    page.click("button:has-text('Stop and keep')")
    page.wait_for_selector("#finished", timeout=180_000)  # it comes by itself, while it is looked at; nothing was judged
    assert page.inner_text(".live .state") == "succeeded" and "zwx is trained" in page.inner_text(
        "#finished"
    )  # nothing was judged
    id = page.url.rpartition("/")[2]
    page.context.close()
    settings = studio.studio.store.get(id).settings
    assert settings["rank"] == 2 and settings["steps"] == 5000 and settings["sample_prompts"] == ["{trigger} cat"]
    return str(id)


def until(page: Any, truth: str) -> None:
    """Wait for what JavaScript says; the browser's own way to wait is refused by the policy."""
    wait(lambda: page.evaluate(truth), bool, 60)


def test_from_sample_pictures_into_the_folder_of_an_image_ui(page: Any, studio: Service, trained: str) -> None:
    page.goto("/library")
    card = page.locator(".book").first
    assert "zwx" in card.inner_text() and "LoRA, rank 2" in card.inner_text() and "trained" in card.inner_text()
    card.locator("text=Check its health").click()
    page.wait_for_selector(".health details")
    assert card.locator(".health summary").inner_text() == "healthy" or card.locator(".health .note b").count()
    card.locator("text=Send to an image UI").click()
    card.locator("text=Copy it there").click()
    page.wait_for_selector(".note.good")
    assert (studio.studio.options.hosts[0] / "zwx.safetensors").is_file()
    card.locator("text=Copy it there").click()  # once more: nothing is overwritten unless somebody says so
    assert "replace" in page.inner_text("#toast .note")
    page.faults[:] = [one for one in page.faults if "409" not in one]
    page.keyboard.press("Escape")
    card.locator("[name=replace]").check()
    card.locator("text=Copy it there").click()
    page.wait_for_selector(".note.good")


def test_compare_vote_and_keep(page: Any, studio: Service, trained: str) -> None:
    page.goto(f"/compare?run={trained}")
    for box in page.locator("[name=checkpoints]").all()[1:]:
        box.uncheck(force=True)
    page.locator("[name=strengths][value='0.6']").uncheck(force=True)
    page.fill("#prompts", "zwx cat")
    page.click("#draw")
    until(page, "document.querySelectorAll('.plotted img').length === 2")
    page.click("text=Vote blindly")
    page.wait_for_url("**/vote")  # and its scripts are there: keys are theirs
    page.wait_for_selector(".pick img")
    sources = [image.get_attribute("src") for image in page.locator(".pick img").all()]
    assert not any("0.8" in source or "strength" in source or "step" in source for source in sources)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".tally")
    (vote,) = map(json.loads, (studio.root / "votes.jsonl").read_text().splitlines())
    assert {vote["chosen"]["strength"], vote["rejected"]["strength"]} == {0.8, 1.0} and vote["prompt"] == "zwx cat"
    assert (studio.root / vote["chosen"]["file"]).is_file() and vote["run"] == trained
    assert studio.client.get("/api/votes").json()["data"] == [vote]
    page.locator(".tally button").first.click()
    page.wait_for_url("**/jobs/*")
    page.wait_for_selector("text=See it in the library")
    assert list((studio.root / "adapters").glob("zwx-final-at-*.safetensors"))


def test_mix_follows_the_sliders_warns_and_merges(page: Any, studio: Service, trained: str) -> None:
    adapter = next((studio.root / "runs").rglob("zwx.safetensors"))
    shutil.copy(adapter, studio.root / "adapters" / "twin.safetensors")
    page.goto("/mix")
    twin = page.locator(".desk li:has(b:text-is('twin'))")
    twin.locator("[type=checkbox]").check()
    page.locator(".desk li:has(b:text-is('zwx')) [type=checkbox]").check()
    page.fill("#prompt", "zwx cat")
    twin.locator("[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert twin.locator("output").inner_text() == "0.85"
    page.wait_for_selector("#drawn img")
    page.wait_for_selector("#meeting .note")
    assert "nearly the same" in page.inner_text("#meeting")
    page.fill("[name=name]", "both")
    page.click("#merge")
    page.wait_for_url("**/jobs/*")
    page.wait_for_selector("text=See it in the library")
    assert (studio.root / "adapters" / "both.safetensors").is_file()
    job = next(job for job in studio.studio.store.list(kinds=("merge",)) if job.name == "both")
    assert any(text.endswith(":0.85") for text in job.settings["files"])


def test_captions_masks_and_twins(page: Any, studio: Service, tmp_path: Path) -> None:
    for number, size in enumerate(((96, 64), (64, 64), (64, 64))):
        Image.linear_gradient("L").rotate(90 * number).resize(size).convert("RGB").save(tmp_path / f"{number}.png")
    shutil.copy(tmp_path / "2.png", tmp_path / "copy-of-2.png")
    page.goto("/dataset")
    page.set_input_files("#files", sorted(map(str, tmp_path.glob("*.png"))))
    page.wait_for_url("**/train/*")
    page.wait_for_selector(".coach .findings")
    name = page.url.partition("?")[0].rpartition("/")[2]
    folder = studio.root / "datasets" / name
    page.click("text=look at them")
    page.wait_for_selector(".frame")
    assert page.locator(".cut").count() == 0 or "cropped" in page.inner_text(".frame")
    page.fill("#caption-1", "a rex dog")
    page.press("#caption-1", "Tab")
    page.wait_for_selector("output:has-text('saved')")
    assert (folder / "0.txt").read_text() == "a rex dog\n"
    page.click("text=Change many captions at once")
    page.fill("#find", "dog")
    page.fill("#put", "cat")
    page.click("text=Show what would change")
    page.click("text=Change 1 caption")
    until(page, "document.querySelector('#caption-1').value === 'a rex cat'")
    page.locator("[data-brush]").first.click()
    page.wait_for_selector("#brush canvas")
    box = page.locator("#brush canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.click("text=Save the mask")
    page.wait_for_selector("text=Change the mask")
    with Image.open(folder / "0-masklabel.png") as mask:
        assert mask.size == (96, 64) and mask.convert("L").getextrema() == (0, 255) and mask.convert("L").getpixel((90, 5)) == 0
    page.click("text=Set 1 picture aside")
    until(page, "document.querySelectorAll('.frame').length === 3")
    assert (folder / "_aside").is_dir() and len(list(folder.glob("*2.png"))) == 1


def test_the_coach_mends_with_one_click(page: Any, studio: Service, trained: str) -> None:
    page.goto("/train/scarf-cat")
    page.click("text=Set trigger = zwx")
    until(page, "document.querySelector('#f-trigger').value === 'zwx'")
    page.check("[value=pocket-style]")
    page.wait_for_selector("#f-class", state="detached")
    assert page.is_checked("[value=pocket-style]")
    page.fill("#f-steps", "7")
    page.press("#f-steps", "Tab")
    page.wait_for_selector("small:has-text('own number')")
    assert page.input_value("#f-trigger") == "zwx"


def test_jobs_are_moved_paused_and_cancelled(page: Any, studio: Service, idle: Service, trained: str) -> None:
    settings = studio.studio.store.get(trained).settings
    first, second, third = (idle.studio.store.add("train", settings, name=name) for name in ("one", "two", "three"))
    page.goto(f"{idle.address}/jobs")
    page.click(f"#ask-first-{third.id}")
    until(page, "document.querySelector('.queue li').innerText.startsWith('three')")
    page.click(f"#ask-pause-{first.id}")
    page.click(f"#ask-resume-{first.id}")
    page.click(f"#ask-cancel-{second.id}")
    page.click(f"#ask-requeue-{second.id}")
    page.wait_for_selector(f"#ask-pause-{second.id}")
    for job in (first, second, third):
        page.click(f"#ask-cancel-{job.id}")
        page.wait_for_selector(f"#ask-requeue-{job.id}")
        assert idle.studio.store.get(job.id).state == "cancelled"


def test_a_press_is_not_lost_behind_an_update(page: Any, studio: Service, idle: Service, trained: str) -> None:
    """An update that is under way when a button is pressed, and one that follows, leave the press alone."""
    job = idle.studio.store.add("train", studio.studio.store.get(trained).settings, name="four")
    page.goto(f"{idle.address}/jobs/{job.id}")
    held: list[Any] = []
    page.route("**/live", lambda route: held.append(route))
    page.evaluate("htmx.trigger(document.body, 'changed')")
    wait(lambda: page.evaluate("0") or held, bool, 60)
    page.click(f"#ask-pause-{job.id}")
    page.evaluate("htmx.trigger(document.body, 'changed')")
    wait(lambda: page.evaluate("0") or idle.studio.store.get(job.id).state, "paused".__eq__, 60)
    for route in held:
        route.continue_()
    page.unroute("**/live")
    page.wait_for_selector(f"#ask-resume-{job.id}")
    page.click(f"#ask-cancel-{job.id}")
    page.wait_for_selector(f"#ask-requeue-{job.id}")


def test_what_goes_wrong_is_told_with_what_to_do(page: Any, studio: Service, trained: str) -> None:
    answer = page.goto("/train/nowhere")
    assert answer.status == 404 and "nowhere" in page.inner_text("h1")
    assert page.goto("/jobs/zzzz").status == 404
    assert page.goto("/nothing/here").status == 404 and page.inner_text("h1") == "There is nothing here"
    page.goto("/train/scarf-cat?trigger=zwx")
    page.wait_for_selector("#f-steps")
    page.evaluate("document.querySelector('#others').open = true")
    page.fill("#f-lr", "-1")
    page.click(".train")
    page.wait_for_selector("#toast .note:has-text('lr')")
    page.evaluate("document.querySelector('#f-steps').type = 'text'")
    page.fill("#f-steps", "many")
    page.click(".train")
    page.wait_for_selector("#toast .note:has-text('whole number')")
    page.faults[:] = [one for one in page.faults if not any(code in one for code in ("404", "400"))]


def test_every_room_fits_a_phone_and_is_walked_by_keys(page: Any, trained: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for address in (*ROOMS, f"/jobs/{trained}", f"/compare?run={trained}", "/dataset/scarf-cat", "/train/scarf-cat"):
        page.goto(address)
        page.wait_for_load_state("load")
        until(page, "!document.querySelector('.wait')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, address
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.querySelectorAll('[style], style, [onclick], script:not([src])').length") == 0


def test_in_a_frame_it_is_as_dark_as_the_ui_around_it(page: Any) -> None:
    """Whatever the system prefers, at once and when the UI's theme changes; by itself it goes by the system."""
    page.emulate_media(color_scheme="light")
    page.goto("/")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    around = "<!doctype html><title>a UI</title><iframe data-theme=dark src=/jobs></iframe>"
    page.route("**/around", lambda route: route.fulfill(content_type="text/html", body=around))
    page.goto("/around")
    page.frame_locator("iframe").locator("h1").wait_for()
    inside = page.frames[-1]
    dark = inside.evaluate(paper)
    assert dark != light
    for system, theme, expected in (
        ("light", "light", light),
        ("dark", "light", light),
        ("light", "dark", dark),
        ("dark", "", dark),
    ):
        page.emulate_media(color_scheme=system)
        page.evaluate("theme => { document.querySelector('iframe').dataset.theme = theme }", theme)
        inside.wait_for_function(f"expected => {paper} === expected", arg=expected)
