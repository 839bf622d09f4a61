"""Forms are made of the recipe, and read back as a recipe's settings; what needs no browser of the other rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servers import Service, pictures, zipped

from personalize import registry
from personalize.cli import run
from personalize.recipe.settings import settings
from personalize.service.errors import Refusal
from personalize.service.hosts import hosts_in, usual_hosts
from personalize.service.page import forms
from personalize.service.requests import job_schema
from personalize.service.serve import address_file


def test_every_setting_of_a_recipe_is_in_the_form() -> None:
    fields = {one.name: one for _, some in forms.sections({}, {}, ("folder",)) for one in some}
    assert fields.keys() == settings().keys() & job_schema("train")["properties"].keys() - {"folder"}
    assert fields["rank"].shown == "8" and fields["rank"].most == 1024 and "rank of the UNet" in fields["rank"].help
    assert fields["optimizer"].choices == tuple(registry.table("optimizers")) and fields["flip"].choices == ("true", "false")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rank", " 4 ", 4),
        ("lr", "1e-3", 0.001),
        ("flip", "false", False),
        ("sample_seeds", "0\r\n3", [0, 3]),
        ("name", "rex", "rex"),
    ],
)
def test_fields_are_read_as_their_settings(name: str, text: str, value: Any) -> None:
    assert forms.read_form({name: text, "unknown": "x", "class": ""}) == {name: value}


def test_a_number_that_is_none_is_told() -> None:
    with pytest.raises(Refusal, match="batch size must be a whole number, not 'two'"):
        forms.read_form({"batch_size": "two"})


def test_image_uis_are_found_where_they_lie(tmp_path: Path) -> None:
    for place in ("ComfyUI/models/loras", "stable-diffusion-webui/models/Lora", "elsewhere/models"):
        (tmp_path / place).mkdir(parents=True)
    assert [path.relative_to(tmp_path).as_posix() for path in usual_hosts(tmp_path)] == [
        "stable-diffusion-webui/models/Lora",
        "ComfyUI/models/loras",
    ]
    assert [one.name for one in hosts_in([tmp_path / "ComfyUI", tmp_path / "ComfyUI" / "models" / "loras"])] == ["ComfyUI"]


def test_pictures_are_set_aside_by_the_api(idle: Service) -> None:
    dataset = idle.client.post("/api/datasets", files={"files": ("aside.zip", zipped(pictures()))}).json()
    answer = idle.client.post(f"/api/datasets/{dataset['id']}/aside", json={"pictures": ["1.png"]})
    assert answer.json() == {"moved": 1}
    folder = Path(dataset["folder"])
    assert sorted(path.name for path in (folder / "_aside").iterdir()) == ["1.png", "1.txt"] and not (folder / "1.txt").exists()
    gone = idle.client.post(f"/api/datasets/{dataset['id']}/aside", json={"pictures": ["0.png", "7.png"]})
    assert gone.status_code == 404 and (folder / "0.png").exists()


def test_ui_opens_the_studio_that_runs(
    busy: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", seen.append)
    address_file(busy.studio.workspace).write_text(busy.address + "\n")
    assert run(["ui", "--workspace", str(busy.root)]) == 0
    assert busy.address in capsys.readouterr().out and seen == [busy.address]


def test_ui_starts_one_where_none_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("webbrowser.open", seen.append)
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    (tmp_path / "ComfyUI" / "models" / "loras").mkdir(parents=True)

    def serve(options: Any, lanes: Any, on_ready: Any) -> int:
        seen.append(options)
        on_ready("http://127.0.0.1:1")
        return 0

    monkeypatch.setattr("personalize.service.serve.serve", serve)
    assert run(["ui", "--workspace", str(tmp_path / "w")]) == 0
    assert seen[0].hosts == (tmp_path / "ComfyUI" / "models" / "loras",) and seen[1] == "http://127.0.0.1:1"
