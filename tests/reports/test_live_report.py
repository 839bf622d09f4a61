"""The report of a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from personalize.reports.run import live, write_report
from personalize.reports.run.live import LiveReport
from personalize.training.events import Finished, Sample, Saved, Step, Stopped

REFRESH = '<meta http-equiv="refresh"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder whose first sample picture is there."""
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "000000-a-rex-s0.png")
    sample = {"event": "sample", "step": 0, "prompt": "a rex", "seed": 0, "path": "samples/000000-a-rex-s0.png", "base": True}
    lines = [json.dumps(record) for record in (sample, {"event": "step", "step": 1, "loss": 0.5})]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_it_is_there_after_the_first_pictures_and_renewed_after_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SHARE", 1e9)  # whatever it costs
    report, page = LiveReport(folder), folder / "report.html"
    picture, step = Sample(0, "a rex", 0, "samples/000000-a-rex-s0.png", True), Step(1, 0.5, 0.1, 0.0, 1.0, 0.1)
    report.show(Saved(0, "x"))
    report.show(step)
    assert not page.exists()  # nothing to show yet
    report.show(picture)
    assert not page.exists()  # others of this step follow
    report.show(step)
    text = page.read_text(encoding="utf-8")
    assert REFRESH in text and "It goes on." in text and "data:image" in text
    page.write_text("old")
    report.show(step)
    assert page.read_text() == "old"  # nothing new
    report.show(picture)
    report.show(step)
    assert REFRESH in page.read_text(encoding="utf-8")
    report.show(picture)
    report.show(Stopped(1))
    text = page.read_text(encoding="utf-8")
    assert REFRESH not in text and "personalize finish" in text and "The same command again" in text
    page.write_text("the whole report")
    report.show(picture)
    report.show(Finished(1, 1.0, "rex.safetensors", 0))
    assert page.read_text() == "the whole report"


def test_it_takes_a_small_share_of_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow_page(folder: Path, **how: bool) -> Path:
        clock[0] += 2.0
        return write_report(folder, **how)

    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(live, "write_report", slow_page)
    report, picture = LiveReport(folder), Sample(0, "a rex", 0, "samples/000000-a-rex-s0.png", True)
    step, written = Step(1, 0.5, 0.1, 0.0, 1.0, 0.1), []
    for _ in range(100):
        before = clock[0]
        report.show(picture)
        report.show(step)
        written.append(clock[0] > before)
        clock[0] += 1.0
    assert written[0] and 2 <= sum(written) <= 5
