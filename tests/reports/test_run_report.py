"""The report of a run folder: whole, self-contained, harmless, and there for whatever is there."""

from __future__ import annotations

import doctest
import hashlib
import json
import math
import random
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from personalize import text
from personalize.errors import DataError, OutputError
from personalize.recipe.resolve import resolve, to_toml
from personalize.reports.kit import curves, tables
from personalize.reports.kit.page import BUDGET
from personalize.reports.run import curves as run_curves
from personalize.reports.run import samples, selection, settings, usage, write_report
from personalize.reports.run.figures import change
from personalize.reports.run.read import read_run

VOID = {"meta", "link", "img", "input", "br", "hr"}
EVIL = """<script>alert("x")</script>'" onerror=alert(1) </style></textarea> & {{ 7 * 7 }}"""
PROMPTS = ("zwx cat", "zwx cat in the snow", f"zwx cat {EVIL}", "a cat")
SECTIONS = {"compare", "choice", "growth", "strength", "use", "data", "figures", "curves", "recipe", "machine", "warnings", "top"}

TORN = '{"event":"started","images":7,"versions":[1]}\n{"event":"st'
BROKEN = ("", "{", "\x00\xff", "[1]\n{}\n" + "[" * 100_000, TORN)
KEYS = ["event", "step", "loss", "lr", "images", "warnings", "time", "path", "prompt", "seed", "recipe", "strength", "seconds",
        "timesteps", "losses", "fit", "validation", "drift", "contrast", "score", "best", "low", "high", "judged_by",
        "versions", "resumed", "peak_bytes", "base", "name", "trigger", "parameters"]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["started", "step", "sample", "sweep", "scored", "chosen", "saved", "finished", "error"]),
    st.none() | st.booleans() | st.integers(-5, 9) | st.floats() | st.text(max_size=4),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


class Reader(HTMLParser):
    """Tags in balance, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""

    def values(self, name: str) -> set[str]:
        return {value for _, found, value in self.attributes if found == name}


def draw(path: Path, hue: int, side: int = 64) -> str:
    """A dot on a plain ground."""
    image = Image.new("RGB", (side, side), (hue, 180, 255 - hue))
    ImageDraw.Draw(image).ellipse((side // 4, side // 4, side // 2, side // 2), "white")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def shot(folder: Path, path: str, hue: int, **record: Any) -> dict[str, Any]:
    draw(folder / path, hue)
    return {"path": path, **record}


def step(n: int, rng: random.Random) -> dict[str, Any]:
    times = [rng.randrange(1000) for _ in range(4)]
    losses = [(1.05 - t / 1000) ** 2 * (0.5 + 0.5 * math.exp(-n / 15)) for t in times]
    told = {"event": "step", "step": n, "loss": sum(losses) / 4, "timesteps": times, "losses": losses}
    return told | {"lr": 1e-3 * n / 40, "text_encoder_lr": 1e-4, "grad_norm": 0.3, "seconds": 0.2}


def start(folder: Path, **more: Any) -> dict[str, Any]:
    captions = ["zwx cat", "small zwx cat", EVIL, ""]
    images = [shot(folder, f"inputs/{i}.png", 40 * i, caption=caption) for i, caption in enumerate(captions)]
    about = {"time": "2025-11-20T17:30:00+00:00", "parameters": 123456, "device": "cpu", "dtype": "float32"}
    said = {"images": images, "warnings": [f"left out: {EVIL}"], "versions": {"torch": "2.13.0"}, "resumed": 0}
    return {"event": "started"} | about | said | more


def events(folder: Path, steps: int) -> list[dict[str, Any]]:
    rng, told = random.Random(0), [start(folder)]
    keys = [(p, prompt, seed) for p, prompt in enumerate(PROMPTS) for seed in (0, 1)]
    for p, prompt, seed in keys:
        told.append(shot(folder, f"samples/base-{p}-{seed}.png", 0, event="sample", step=0, prompt=prompt, seed=seed, base=True))
    for n in range(1, steps + 1):
        told.append(step(n, rng))
        for p, prompt, seed in keys if n % 20 == 0 else ():
            path = f"samples/{n}-{p}-{seed}.png"
            told.append(shot(folder, path, 5 * n, event="sample", step=n, prompt=prompt, seed=seed, base=False))
        if n % 20 == 0:
            told.append({"event": "saved", "step": n, "path": f"checkpoints/zwx-{n:06}.safetensors"})
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / told[-1]["path"]).write_bytes(b"x" * 4321)
    return told


def scored(step: int, strength: float, **more: Any) -> dict[str, Any]:
    told = {"fit": step / 80, "validation": step / 80, "drift": 0.1 * strength, "contrast": 0.6, "score": step / 80 - 0.2}
    return {"event": "scored", "step": step, "strength": strength} | told | more


def ending(folder: Path, steps: int) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = [scored(n, 1.0) for n in (20, steps)] + [scored(steps, s) for s in (0.5, 1.5)]
    about = {"fit": 0.5, "validation": 0.5, "drift": 0.1, "contrast": 0.6, "judged_by": "the training pictures"}
    told.append({"event": "chosen", "step": steps, "best": steps, "among": 2, "low": 0.7, "weight": 1.0, "high": 1.1} | about)
    told += [
        shot(folder, f"sweep/{s}.png", int(100 * s), event="sweep", step=steps, strength=s, prompt="zwx cat", seed=0)
        for s in (0, 0.25, 0.5, 0.75, 1, 1.25)
    ]
    (folder / "zwx.safetensors").write_bytes(b"x" * 1_234_567)
    told.append({"event": "saved", "step": steps, "path": "zwx.safetensors"})
    return [*told, {"event": "finished", "step": steps, "seconds": 48.0, "path": "zwx.safetensors", "peak_bytes": 1_300_000_000}]


def write(folder: Path, told: list[dict[str, Any]], **flags: Any) -> Path:
    known = {"folder": "photos", "trigger": "zwx", "class": "cat", "steps": 40, "rank": 16, "output": str(folder)}
    (folder / "recipe.toml").write_text(to_toml(resolve(None, known | flags)))
    (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder = write(tmp_path, events(tmp_path, 40) + ending(tmp_path, 40))
    rows = [
        {"name": "identity", "base": 10, "adapter": 82, "ceiling": 100, "better": "higher", "explain": EVIL, "unit": "%"},
        {"name": "leak", "base": 0, "adapter": 1.5, "better": "lower"},
        {"name": "broken", "adapter": "high"},
    ]
    (folder / "metrics.json").write_text(json.dumps({"rows": rows}))
    (folder / "zwx.json").write_text(json.dumps({"preferred weight": 1.0}))
    return folder


def read(folder: Path) -> tuple[str, Reader]:
    html = write_report(folder).read_text(encoding="utf-8")
    reader = Reader(html)
    assert not reader.open
    return html, reader


def test_a_finished_run_has_every_section(finished: Path) -> None:
    html, reader = read(finished)
    assert reader.values("id") >= SECTIONS
    anchors = {value[1:] for value in reader.values("href") if value.startswith("#")}
    assert anchors <= reader.values("id")
    assert "Unfinished" not in reader.text
    for words in (
        "0.7 to 1.1",
        "4 pictures",
        "48 s",
        "1.2 MB",
        "+72",
        "step 40",
        "strength 1.25",
        "1.3 GB",
        "123,456",
    ):
        assert words in html, words
    assert len(html) < BUDGET
    assert not list(finished.glob("*.part")) and not list(finished.glob(".*"))


def test_nothing_is_loaded_from_elsewhere(finished: Path) -> None:
    html, reader = read(finished)
    for value in reader.values("src") | reader.values("href"):
        assert value.startswith(("data:image/webp;base64,", "#")), value[:80]
    assert "url(" not in html and "@import" not in html and "://" not in html.replace(html[html.find("recipe.toml") :], "")
    assert "default-src 'none'" in html


def test_pictures_are_there_and_small_ones_stay_crisp(finished: Path) -> None:
    _, reader = read(finished)
    styles = {value for tag, name, value in reader.attributes if (tag, name) == ("img", "style")}
    assert reader.tags.count("img") == 4 + 2 + 16 + 24 + 6 + 4  # fan, hero, pairs, checkpoints, sweep, album
    assert styles == {"--w:64px"}
    assert all(value for tag, name, value in reader.attributes if (tag, name) == ("img", "width"))


def test_text_from_outside_stays_text(finished: Path) -> None:
    html, reader = read(finished)
    assert reader.tags.count("script") == 1 and reader.tags.count("style") == 1
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert reader.text.count(EVIL) >= 6  # caption, prompts, warning, explanation, commands
    assert EVIL in reader.values("alt")
    assert "alert(" not in html[html.rindex("<script>") :]


def test_an_unfinished_run_shows_what_is_there(tmp_path: Path) -> None:
    _, reader = read(write(tmp_path, events(tmp_path, 30)))
    assert "30 of 40 steps are done; the last checkpoint is step 20" in reader.text
    assert {"compare", "use", "curves"} <= reader.values("id")
    assert not {"growth", "strength", "figures"} & reader.values("id")
    assert "zwx-000020.safetensors" in reader.text


def test_an_error_is_told(tmp_path: Path) -> None:
    _, reader = read(write(tmp_path, [start(tmp_path), step(1, random.Random(0)), {"event": "error", "message": EVIL}]))
    assert f"It stopped with: {EVIL}" in reader.text


@pytest.mark.parametrize("text", BROKEN)
def test_an_empty_or_broken_folder_still_gives_a_page(tmp_path: Path, text: str) -> None:
    for name in ("events.jsonl", "recipe.toml", "metrics.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    _, reader = read(tmp_path)
    assert reader.values("id") >= {"top", "recipe"}


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=9))
def test_strange_records_do_no_harm(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("strange")
    (folder / "events.jsonl").write_text((json.dumps(record) + "\n") * 3)
    read(folder)


def test_no_folder_and_no_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report(tmp_path)


def test_pictures_outside_the_folder_are_not_taken_in(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    draw(secret, 9)
    (run := tmp_path / "run").mkdir()
    (run / "link.png").symlink_to(secret)
    paths = ["../secret.png", str(secret), "link.png", "missing.png", "a\0b", "."]
    told = [{"event": "sample", "step": 1, "prompt": "zwx", "seed": i, "path": path} for i, path in enumerate(paths)]
    told.append({"event": "started", "images": [{"path": path, "caption": "c", "sha256": "0"} for path in paths]})
    _, reader = read(write(run, told))
    assert "img" not in reader.tags


def test_training_pictures_are_found_where_they_were_unless_they_changed(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (300, 200), "teal").save(photo)
    image = {"path": str(photo), "caption": "zwx cat", "sha256": hashlib.sha256(photo.read_bytes()).hexdigest()}
    (run := tmp_path / "run").mkdir()
    write(run, [start(run, images=[image])])
    _, reader = read(run)
    sizes = [(name, value) for tag, name, value in reader.attributes if tag == "img" and name in ("width", "height")]
    assert sizes == [("width", "200"), ("height", "200")] * 2
    Image.new("RGB", (300, 200), "red").save(photo)
    assert "img" not in read(run)[1].tags


def test_broken_pictures_are_left_out(finished: Path) -> None:
    whole = read(finished)[1].tags.count("img")
    path = finished / "samples" / "20-0-1.png"
    path.write_bytes(path.read_bytes()[:100])
    _, reader = read(finished)
    assert reader.tags.count("img") == whole - 1
    assert "not drawn" in reader.text


def test_large_pictures_are_brought_down_to_a_page_that_travels(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    told = []
    for seed in range(8):
        path = tmp_path / f"{seed}.png"
        Image.fromarray(noise.integers(0, 255, (600, 600, 3), np.uint8)).save(path, compress_level=0)
        told.append({"event": "sample", "step": 1, "prompt": "zwx", "seed": seed, "path": path.name})
    html, reader = read(write(tmp_path, told))
    sizes = {value for tag, name, value in reader.attributes if (tag, name) == ("img", "width")}
    assert len(html) < BUDGET and reader.tags.count("img") >= 8 and sizes == {"512"}
    assert "crisp" not in reader.values("class")


def test_a_resumed_run_tells_each_step_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    told = [start(tmp_path), *(step(n, rng) for n in range(1, 31))]
    told += [start(tmp_path, resumed=20), *(step(n, rng) for n in range(21, 26))]
    run = read_run(write(tmp_path, told))
    assert [record["step"] for record in run.steps] == list(range(1, 26))
    assert run.steps[-1] == told[-1] and run.starts == 2
    assert ("resumed", "1 time") in settings.environment(run)


def test_asking_for_a_finished_run_again_keeps_its_time(finished: Path) -> None:
    again = {"event": "finished", "step": 40, "seconds": 0.0, "path": "zwx.safetensors", "again": True}
    with (finished / "events.jsonl").open("a") as diary:
        diary.write(json.dumps(again) + "\n")
    assert settings.training_seconds(read_run(finished)) == 48.0


def test_the_choice_is_marked_and_shown_with_its_evidence(finished: Path) -> None:
    page = selection.selection(read_run(finished))
    assert page and page.step == 40 and page.heads == ("error gone", "drift", "contrast", "score")
    assert page.rows == ((20, ("25 %", "10 %", "60 %", "0.05"), False), (40, ("50 %", "10 %", "60 %", "0.30"), True))
    assert [panel.title for panel in page.panels] == ["by step", "step 40 by strength"]
    assert [len(panel.readings) for panel in page.panels] == [2, 3] and page.panels[1].readings[0][2] == 0.5
    html, reader = read(finished)
    assert html.count('<tr class="chosen"><th>40</th>') == 1 and "Step 40 became the adapter, of 2 checkpoints" in reader.text


def test_pictures_that_were_not_learned_have_a_column_and_a_curve_below_zero(finished: Path) -> None:
    run = read_run(finished)
    told = tuple({**record, "validation": -0.2 if record["step"] == 40 else None} for record in run.scored)
    page = selection.selection(replace(run, scored=told))
    assert page and page.heads[1] == "not learned" and page.rows[0][1][1] == "–" and page.rows[1][1][1] == "-20 %"
    lines = {line.label: line.d for line in page.panels[1].lines}
    assert "on pictures not learned" in lines
    numbers = [float(word) for d in lines.values() for word in d.replace("M", "L").replace("L", " ").split()]
    assert all(0 <= value <= curves.BOX for value in numbers)


def test_the_pictures_of_the_chosen_step_are_compared(finished: Path) -> None:
    run = read_run(finished)
    assert run.chosen
    earlier = replace(run, chosen={**run.chosen, "step": 20})
    pair = samples.before_and_after(earlier, lambda path, side: path, 64)[0]
    assert [picture for _, picture in pair.frames] == ["samples/base-0-0.png", "samples/20-0-0.png"]


# ---------------------------------------------------------------- curves


def test_the_loss_curve_is_freed_from_the_luck_of_the_timesteps() -> None:
    rng = random.Random(3)
    steps = [step(n, rng) for n in range(1, 200)]
    truth = np.array([0.5 + 0.5 * math.exp(-n / 15) for n in range(1, 200)])

    def likeness(points: list[tuple[float, float]]) -> float:
        return float(np.corrcoef(truth, [value for _, value in curves.smooth(points)])[0, 1])

    raw, steady = run_curves.series(steps, "loss"), run_curves.detrended_loss(steps)
    assert np.std([v for _, v in steady][100:]) < 0.5 * np.std([v for _, v in raw][100:])
    assert likeness(steady) > max(0.9, likeness(raw))
    assert np.mean([v for _, v in steady]) == pytest.approx(np.mean([v for _, v in raw]))


def test_steps_without_pictures_or_numbers_are_skipped() -> None:
    losses: list[Any] = [None, 0.5, float("nan"), 0.25]
    steps = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    assert run_curves.detrended_loss(steps) == [(2, 0.5), (4, 0.25)]
    assert [panel.title for panel in run_curves.panels(steps)] == ["loss"]
    assert run_curves.panels(steps[:2]) == []


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e6)), min_size=2, unique_by=lambda point: point[0]))
def test_curves_stay_in_their_box(found: list[tuple[float, float]]) -> None:
    points = sorted(found)
    smoothed = curves.smooth(points)
    values = [value for _, value in points]
    assert all(min(values) * 0.999 - 1e-9 <= value <= max(values) * 1.001 + 1e-9 for _, value in smoothed)
    drawn = curves.plot("loss", [("smooth", "loss", smoothed)], points)
    numbers = [float(word) for word in drawn.lines[0].d.replace("M", "L").replace("L", " ").split()]
    assert all(0 <= value <= curves.BOX for value in numbers)
    assert all(0 <= place <= 100 for place, _ in (*drawn.rows, *drawn.columns))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    found = curves.ticks(low, high)
    assert len(found) <= 10 and all(low - 1e-6 * width - 1e-9 <= tick <= high + 1e-6 * width + 1e-9 for tick in found)


# ---------------------------------------------------------------- words, figures, commands


@pytest.mark.parametrize(
    ("base", "adapter", "text"), [(10, 80, "+70"), (90, 80, "-10"), (0, 1.5, "+1.5"), (5, 5, "unchanged"), (None, 5, "")]
)
def test_a_figure_says_what_changed_and_not_whether_that_is_good(base: float | None, adapter: float, text: str) -> None:
    assert change(base, adapter) == text


def test_the_recipe_names_what_differs(finished: Path) -> None:
    changed = {name: (value, default) for name, value, default, _ in settings.changed_settings(read_run(finished).recipe)}
    assert changed["rank"] == ("16", "8") and changed["steps"] == ("40", "200")
    assert not {"alpha", "lr", "output", "sample_prompts"} & changed.keys()


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_commands_can_be_typed(finished: Path, dialect: str) -> None:
    prompt = 'it\'s a "zwx" cat; rm -rf $HOME `x` \\'
    run = read_run(write(finished, [], dialect=dialect))
    here, diffusers, a1111, comfy = usage.programs(run, prompt)
    assert shlex.split(here.parts[0][1])[:3] == ["personalize", "generate", prompt]
    assert shlex.split(here.parts[0][1])[-1].endswith("zwx.safetensors:1")
    compile(diffusers.parts[0][1], "snippet", "exec")
    assert f"    {prompt!r}," in diffusers.parts[0][1]
    assert a1111.parts[-1][1] == f"<lora:zwx:1> {prompt}"
    assert json.loads(comfy.parts[-1][1])["inputs"]["lora_name"] == "zwx.safetensors"
    assert (len(a1111.parts), len(comfy.parts)) == ((2, 2) if dialect == "kohya" else (3, 3))


@pytest.mark.parametrize(("base", "family", "line"), [
    ("sd.safetensors", "sd1", "StableDiffusionPipeline.from_single_file(base)"),
    ("xl.safetensors", "sdxl", "StableDiffusionXLPipeline.from_single_file(base)"),
    ("someone/xl", "sdxl", "StableDiffusionXLPipeline.from_pretrained(base)"),
])  # fmt: skip
def test_diffusers_reads_each_base_as_what_it_is(finished: Path, base: str, family: str, line: str) -> None:
    run = read_run(write(finished, [start(finished, base={"family": family})], base=base))
    assert f"pipe = {line}" in usage.programs(run, "a cat")[1].parts[0][1]


@pytest.mark.parametrize("module", [curves, tables, text])
def test_examples_in_the_docs(module: Any) -> None:
    tried = doctest.testmod(module)
    assert tried.attempted and not tried.failed


def test_a_report_needs_no_torch() -> None:
    code = "import sys, personalize.reports.run; print(sorted({'torch', 'diffusers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "events.jsonl").write_text("")
    with pytest.raises(DataError, match=f"is no run, but holds 1 .give one of them, such as {tmp_path / 'rex'}"):
        write_report(tmp_path)
    assert write_report(tmp_path / "rex").is_file()
