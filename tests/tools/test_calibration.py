"""The calibration: another cast, regressions that find what was put in, intervals that hold, goals that can be missed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from personalize.models.model import Base
from personalize.training.calibration import between, calibration_of
from tools.pocket import cast
from tools.pocket.art_objects import DRAWINGS
from tools.pocket.art_styles import COLOURLESS, SEEN, UNSEEN
from tools.pocket.art_subjects import SUBJECTS
from tools.pocket.calibration.fit import FACTORS, SHOWN, Point, error_table, estimate, left_out, regress_all
from tools.pocket.proof.verdict import figures, regret_of


@pytest.fixture
def stage() -> Iterator[None]:
    """Afterwards the world's own are back."""
    before = dict(SUBJECTS), dict(UNSEEN), set(COLOURLESS)
    yield
    for table, content in zip((SUBJECTS, UNSEEN), before[:2], strict=True):
        table.clear()
        table.update(content)  # type: ignore[arg-type]
    COLOURLESS.clear()
    COLOURLESS.update(before[2])


def test_another_cast_has_none_of_the_benchmarks(stage: None) -> None:
    own = {*SUBJECTS, *UNSEEN}
    cast.stage(16)
    assert not own & {*SUBJECTS, *UNSEEN} and len(SUBJECTS) == cast.EACH * len(DRAWINGS) and len(UNSEEN) == cast.LOOKS
    assert all(subject.marks and name.startswith(subject.class_name) for name, subject in SUBJECTS.items())
    looks = [subject.looks for subject in SUBJECTS.values()]
    cast.stage(16)
    assert looks == [subject.looks for subject in SUBJECTS.values()] and len(set(looks)) > 20
    assert {*UNSEEN} >= COLOURLESS


def test_the_plain_style_keeps_colours() -> None:
    assert cast.keeps_colours(SEEN["plain"]) and not cast.keeps_colours(UNSEEN["blueprint"])


def made_up(count: int, noise: float) -> list[Point]:
    """Points of which each image shows what was taught as `toward` says; all else is well."""
    rng = np.random.default_rng(3)
    points = []
    for i in range(count):
        signs: dict[str, Any] = {name: float(rng.normal()) for signs in FACTORS.values() for name in signs}
        shares, shown = {}, {}
        for of, level in (("called", rng.normal()), ("plain", -2.0)):
            for name in ("same", "toward"):
                signs[f"{of}_{name}"] = (level * (name == "toward") + rng.normal(size=8)).tolist()
            chances = 1 / (1 + np.exp(-4 * np.array(signs[f"{of}_toward"]) + noise * rng.normal(size=8)))
            shares[of], shown[of] = float(np.mean(chances)), (rng.random(8) < chances).astype(float).tolist()
        factors = {"identity": shares["called"], "fidelity": 0.95, "leak": shares["plain"], "kept": 0.97}
        truth = factors["identity"] * factors["fidelity"] * (1 - factors["leak"]) * factors["kept"]
        points.append(Point(f"run {i // 4}", signs, truth, factors, shown, {}))
    return points


def test_weights_lie_on_the_signs_that_matter_and_estimates_follow_the_truth() -> None:
    points = made_up(80, 0.0)
    models = regress_all(points)
    shown = models["shown"].weights
    assert max(shown, key=lambda name: abs(shown[name])) == "toward"
    errors = [estimate(models, point.signs) - point.truth for point in points]
    assert float(np.std(errors)) < 0.1


def test_intervals_hold_for_runs_that_were_left_out() -> None:
    points = made_up(100, 1.0)
    found, truths = left_out(points), np.array([point.truth for point in points])
    rows = error_table(found, truths)
    assert [x for x, _ in rows] == sorted(x for x, _ in rows) and all(error > 0 for _, error in rows)
    errors = np.array([between(rows, x) for x in found])
    assert 0.7 <= np.mean(np.abs(found - truths) <= errors) <= 0.9


def record(rows: list[tuple[float, float]], chosen: int, **more: Any) -> dict[str, Any]:
    levels = {True: "good", False: "poor"}
    told = [
        {"step": i, "truth": truth, "value": value, "low": value - 0.1, "high": value + 0.1, "level": levels[value > 0.7]}
        for i, (truth, value) in enumerate(rows)
    ]
    return {"checkpoints": told, "chosen": {"step": chosen}, "choosing": 10.0, "training": 50.0} | more


def test_the_goals_can_be_met_and_missed() -> None:
    met = figures([record([(0.1, 0.1), (0.6, 0.6), (0.9, 0.9), (0.3, 0.45), (0.8, 0.82)], 2)])
    assert [figure.met for figure in met] == [True, True, True, True, True, True]
    missed = figures([record([(0.2, 0.9), (0.9, 0.2), (0.5, 0.5)], 0, choosing=30.0)])
    assert [figure.met for figure in missed] == [False] * 6
    assert regret_of(record([(0.2, 0.9), (0.9, 0.2)], 0)) == pytest.approx(0.7)


def test_the_table_that_is_shipped_was_made_by_the_command() -> None:
    table = calibration_of(Base.load("pocket"))
    assert table and table.nouns == tuple(DRAWINGS)
    wanted = {name: set(signs) for name, signs in (FACTORS | {"shown": SHOWN}).items()}
    assert {name: set(factor.weights) for name, factor in table.factors.items()} == wanted
