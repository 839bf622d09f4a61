"""Every preset trains on a base of its family, and each family finds its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bases
import pytest
from slow import all_but

from personalize.adapters.adapter import Adapter
from personalize.api.recipes import preset_prefix
from personalize.cli import run
from personalize.recipe.resolve import presets, resolve
from personalize.training.events import Finished
from personalize.training.loop import train

FAMILIES = {"pocket": "pocket", "sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
PURPOSES = ("style", "subject", "face", "low-memory")
QUICK = {"steps": 1, "accumulate": 1, "resolution": 64, "sample_steps": 1, "sample_seeds": [0], "checkpoint_every": 0}
QUICK |= {"choose": "none"}
FAST = {"pocket-subject", "sd15-style"}  # small bases; the others, of the same loop and tables, in `make test-all`


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, base_builder: Callable[..., Path]) -> dict[str, Path]:
    """A tiny base of each family."""
    path = tmp_path_factory.mktemp("presets")
    singles = {name: bases.single(path / f"{name}.safetensors", name) for name in ("sd1", "sd2", "sdxl")}
    return {"pocket": base_builder(path / "pocket"), **singles}


def test_every_base_has_a_preset_for_every_purpose() -> None:
    assert set(presets()) == {f"{base}-{purpose}" for base in FAMILIES for purpose in PURPOSES}


@pytest.mark.parametrize("name", all_but(FAST, presets()))
def test_every_preset_trains(name: str, shelf: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    base = shelf[FAMILIES[name.partition("-")[0]]]
    recipe = resolve(name, {"folder": pictures, "class": "cat", "base": str(base), "output": tmp_path / "run", **QUICK})
    *_, last = train(recipe)
    assert isinstance(last, Finished)
    adapter = Adapter.load(tmp_path / "run" / "zwx.safetensors")
    assert {delta.rank for path, delta in adapter.deltas.items() if path.startswith("unet.")} == {recipe.adapter.rank}
    learned = {path.partition(".")[0].removesuffix("_2") for path in adapter.deltas}
    assert learned == {"unet", *(["text_encoder"] if recipe.optim.text_encoder_lr else [])}


@pytest.mark.parametrize("base", FAMILIES)
def test_a_base_finds_the_preset_of_its_family_whatever_its_name(
    base: str, shelf: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shelf[FAMILIES[base]]
    named = tmp_path / f"sdxl_but_not_really{file.suffix}"
    named.symlink_to(file)
    assert preset_prefix(str(named)) == base
    assert run(["train", str(pictures), "--dry-run", "--class", "cat", "--base", str(named)]) == 0
    assert f"# from preset {base}-subject" in capsys.readouterr().out
