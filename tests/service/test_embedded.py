"""The service inside of an image UI: what its plugin tells, and what follows from that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from servers import Service, png, serving, wait

from personalize.service.options import Options
from personalize.service.page import train

HTML = {"accept": "text/html", "x-forwarded-prefix": "/art"}


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of an image UI, with a checkpoint and an adapter."""
    root = tmp_path_factory.mktemp("ui")
    for name in ("Lora", "Stable-diffusion"):
        (root / "models" / name).mkdir(parents=True)
    up, down = torch.ones(8, 2), torch.ones(2, 8)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, root / "models" / "Lora" / "rex.safetensors")
    return root


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(Options(tmp_path_factory.mktemp("embedded") / "workspace")) as service:
        yield service


def register(service: Service, *folders: Path | str) -> None:
    (service.root / "folders.json").write_text(json.dumps([str(folder) for folder in folders]), encoding="utf-8")


def test_folders_of_a_ui_are_known_at_once(service: Service, ui: Path) -> None:
    """Those that are made known while the service runs; what is no list of folders makes nothing known."""
    path = str(ui / "models" / "Lora" / "rex.safetensors")
    assert service.client.post("/api/adapters/bring", json={"path": path}).status_code == 403
    register(service, ui / "models" / "Lora", "models", "/nowhere")
    assert [one["name"] for one in service.client.get("/api/hosts").json()["data"]] == ["A1111 or Forge"]
    (ui / "models" / "Lora" / "rex.png").write_bytes(png())
    brought = service.client.post("/api/adapters/bring", json={"path": path})
    assert brought.status_code == 201 and brought.json()["name"] == "rex" and brought.json()["preview"]
    assert service.client.post("/api/adapters/bring", json={"path": path}).json()["id"] == brought.json()["id"]
    for spoilt in ("{", '{"a": 1}', "[1, null]", '["\\u0000"]'):
        (service.root / "folders.json").write_text(spoilt, encoding="utf-8")
        assert service.client.get("/api/hosts").json()["data"] == []
        assert service.client.post("/api/adapters/bring", json={"path": path}).status_code == 403


def test_another_adapter_of_the_same_name_is_not_mixed_up(service: Service, ui: Path, tmp_path: Path) -> None:
    other = tmp_path / "rex.safetensors"
    shutil.copyfile(ui / "models" / "Lora" / "rex.safetensors", other)
    register(service, ui / "models" / "Lora", tmp_path)
    service.client.post("/api/adapters/bring", json={"path": str(ui / "models" / "Lora" / "rex.safetensors")}).raise_for_status()
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert service.client.post("/api/adapters/bring", json={"path": str(other)}).json()["error"]["code"] == "exists"
    assert service.client.post("/api/adapters/bring", json={"path": str(tmp_path / "none.safetensors")}).status_code == 404
    assert service.client.post("/api/adapters/bring", json={"path": str(tmp_path)}).status_code == 404


def test_what_was_sent_is_told_to_the_ui(service: Service, ui: Path) -> None:
    """The page says the name, the trigger and the strength; the words that a UI takes are made of them there."""
    register(service, ui / "models" / "Lora")
    path = str(ui / "models" / "Lora" / "rex.safetensors")
    one = service.client.post("/api/adapters/bring", json={"path": path}).json()
    Path(one["path"]).with_suffix(".json").write_text('{"preferred weight": 0.7}', encoding="utf-8")
    form = {"folder": str(ui / "models" / "Lora"), "replace": "true"}
    answer = service.client.post(f"/library/{one['id']}/send", data=form, headers=HTML | {"hx-request": "true"})
    assert answer.status_code == 200 and (ui / "models" / "Lora" / "rex.json").is_file()
    text = answer.text.replace("&#34;", '"')
    assert '"name": "rex"' in text and '"weight": 0.7' in text and '"personalize": "prompt"' in text
    Path(one["path"]).with_suffix(".json").write_text("{", encoding="utf-8")
    text = service.client.post(f"/library/{one['id']}/send", data=form, headers=HTML | {"hx-request": "true"}).text
    assert "&#34;weight&#34;: 0.8" in text


def test_the_checkpoint_of_the_ui_is_the_base(
    service: Service, ui: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    """Unless something else is asked for, or it lies where requests may not name files; and not for the sample pictures."""
    base = ui / "models" / "Stable-diffusion" / "art"
    shutil.copytree(tiny_base, base)
    register(service, ui / "models" / "Stable-diffusion")
    dataset = service.client.post("/api/datasets", files=[("files", ("a.png", png(64), "image/png"))]).json()["id"]

    def chosen(headers: dict[str, str], query: str = "") -> str:
        text = service.client.get(f"/train/{dataset}/plan?class=cat{query}", headers=HTML | headers).text
        return text.partition('name="base_before" value="')[2].partition('"')[0]

    told = {"x-personalize-base": str(base)}
    assert chosen({}) == "pocket" and chosen(told) == str(base) and chosen(told, "&base=pocket") == "pocket"
    assert chosen(told, "&preset=pocket-subject") == "pocket" and chosen({"x-personalize-base": "/etc"}) == "pocket"
    sent = service.client.post("/train/sample/subject", headers=HTML | told)
    assert sent.headers["location"].startswith("/art/train/") and "base=pocket" in sent.headers["location"]
    assert "base=" not in service.client.post("/train/sample/subject", headers=HTML).headers["location"]
    assert str(base) in train.bases(service.studio)


def test_who_is_not_on_this_machine_tells_nothing(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix and a base come from who passes requests on here, or with the token."""
    from personalize.service import prefix

    assert 'href="/art/jobs"' in service.client.get("/", headers=HTML).text
    monkeypatch.setattr(prefix, "is_local", lambda _: False)
    assert 'href="/jobs"' in service.client.get("/", headers=HTML).text
    headers = [(b"x-forwarded-prefix", b"/art"), (b"authorization", b"Bearer a token that nobody guesses")]
    scope = {"type": "http", "headers": headers, "client": ("10.0.0.1", 1)}
    middleware = prefix.Prefix(lambda *_: None, "a token that nobody guesses")  # type: ignore[arg-type, return-value]
    assert middleware.prefix(scope) == "/art"
    assert prefix.Prefix(lambda *_: None, "another").prefix(scope) == ""  # type: ignore[arg-type, return-value]


def test_pages_of_other_sites_may_not_frame_it(service: Service) -> None:
    assert "frame-ancestors 'self'" in service.client.get("/", headers=HTML).headers["content-security-policy"]
    assert wait(lambda: service.client.get("/health").status_code, lambda status: status == 200)
