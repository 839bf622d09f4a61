"""The extension of A1111 and its kin, under a stand-in of the host: what it adds, asks, and does with the host's model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host_stub import installed
from personalize_a1111 import host
from personalize_a1111.card import Card
from personalize_studio import Refusal
from servers import SHORT, Service, png, wait
from starlette.applications import Starlette
from starlette.testclient import TestClient

EXTENSION = Path(__file__).resolve().parents[2] / "webui_ext" / "a1111"


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A host without gradio, whose workspace is the test's own."""
    gradio: Any = types.ModuleType("gradio")
    gradio.html = []
    gradio.Blocks = lambda **_: contextlib.nullcontext("blocks")
    gradio.HTML = gradio.html.append
    gradio.Number = object()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setenv("PERSONALIZE_WORKSPACE", str(tmp_path / "workspace"))
    with installed(tmp_path) as found:
        yield {**found, "gradio": gradio}
        if "personalize_a1111.studio" in sys.modules:
            sys.modules["personalize_a1111.studio"].CARD.stop()


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("personalize_studio.py", EXTENSION / "scripts" / "personalize_studio.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install_does_nothing(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime for path in EXTENSION.iterdir()}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(EXTENSION / "install.py")], capture_output=True, cwd=tmp_path, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"") and not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime for path in EXTENSION.iterdir()} == before


def test_what_it_adds_to_the_host(stubs: dict[str, Any]) -> None:
    load_script()
    heard, opts = stubs["modules.script_callbacks"].heard, stubs["modules.shared"].opts
    (tab,) = heard["on_ui_tabs"][0]()
    assert tab == ("blocks", "Personalize", "personalize") and 'data-src="./personalize/-/"' in stubs["gradio"].html[0]
    heard["on_ui_settings"][0]()
    assert set(opts.infos) == set(host.OPTIONS) and all(info.section == host.SECTION for info in opts.infos.values())
    assert [name for name, info in opts.infos.items() if info.restrict_api] == list(
        sorted(host.FOR_OWNERS, key=list(opts.infos).index)
    )
    server = Starlette()
    server.mount("/", lambda *_: None)  # a host's route that takes any path
    heard["on_app_started"][0](None, server)
    assert len(server.routes) == 1, "without a page there is nothing to show it in"
    heard["on_app_started"][0](object(), server)
    with TestClient(server, base_url="http://localhost") as client:
        assert client.get("/personalize/-/status").json()["workspace"].endswith("workspace")
        assert "<!doctype html>" in client.get("/personalize/-/").text
        assert client.post("/personalize/-/lora", json={"name": "none"}).status_code == 404
        assert (
            client.post("/personalize/-/lora", json={"name": "x"}, headers={"origin": "http://evil.example"}).status_code == 403
        )
        assert client.post("/personalize/-/refresh", json={}).json() == {"done": True}


def test_its_settings(stubs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = stubs["modules.shared"]
    host.add_options()
    vars(shared.opts).update(
        personalize_python="/p", personalize_devices="cuda:1, cpu", personalize_names="a.example,", personalize_port=8
    )
    found = host.settings()
    assert (found.python, found.devices, found.names, found.port) == ("/p", ("cuda:1", "cpu"), ("a.example",), 8)
    assert found.folders == tuple(str(tmp_path / "models" / name) for name in ("Lora", "Stable-diffusion"))
    shared.cmd_opts.disable_extension_access = True  # as with --listen: who comes from elsewhere names nothing that is run
    assert host.settings().python == ""
    monkeypatch.setenv("PERSONALIZE_PYTHON", "/of/the/owner")
    assert host.settings().python == "/of/the/owner"
    shared.cmd_opts.server_name, shared.demo = "art.example", SimpleNamespace(share_url="https://0123.gradio.live")
    assert host.settings().names == ("a.example", "art.example", "0123.gradio.live")


def test_the_checkpoint_is_the_base(stubs: dict[str, Any], tmp_path: Path) -> None:
    assert host.checkpoint() == str(tmp_path / "models" / "Stable-diffusion" / "art.safetensors")
    stubs["modules.sd_models"].get_closet_checkpoint_match = lambda _: SimpleNamespace(filename="/art.ckpt")
    assert host.checkpoint() == ""
    stubs["modules.shared"].opts.sd_model_checkpoint = None
    stubs["modules.sd_models"].get_closet_checkpoint_match = lambda _: None
    assert host.checkpoint() == ""


def test_loras_of_the_host(stubs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "Lora" / "deep").mkdir()
    (tmp_path / "models" / "Lora" / "deep" / "rex.safetensors").touch()
    assert host.find_lora("rex").endswith("deep/rex.safetensors") and host.find_lora("other") == ""
    listed: Any = types.ModuleType("networks")
    listed.available_networks = {"alias": SimpleNamespace(filename="/loras/other.safetensors")}
    listed.list_available_networks = lambda: listed.available_networks.clear()
    monkeypatch.setitem(sys.modules, "networks", listed)
    assert host.find_lora("alias") == "/loras/other.safetensors"
    host.refresh_loras()
    assert host.find_lora("alias") == ""


def test_who_is_logged_in(stubs: dict[str, Any]) -> None:
    """With --gradio-auth the studio is for who has logged in to the host, by gradio's own word."""
    user = SimpleNamespace(path="/user", endpoint=lambda request: "me" if request.cookies.get("access-token") == "good" else None)
    scope = {"type": "http", "headers": [(b"cookie", b"access-token=good")]}
    assert host.may_enter(scope | {"app": SimpleNamespace(auth=None, routes=[])})
    assert host.may_enter(scope | {"app": SimpleNamespace(auth={"me": "x"}, routes=[user])})
    assert not host.may_enter(scope | {"headers": [], "app": SimpleNamespace(auth={"me": "x"}, routes=[user])})
    assert not host.may_enter(scope | {"app": SimpleNamespace(auth={"me": "x"}, routes=[])})


class Card_(Card):
    """One that is told whether a training runs."""

    busy = False

    def is_training(self) -> bool:
        return self.busy


def test_the_model_makes_room_and_comes_back(stubs: dict[str, Any]) -> None:
    settings, wants = SimpleNamespace(devices=()), {"personalize_unload": True, "personalize_load_back": True}
    bridge: Any = SimpleNamespace(service=SimpleNamespace(settings=settings))
    done, card = stubs["modules.sd_models"].done, Card_(bridge, wants.__getitem__)
    for card.busy in (False, True, True, False, False):
        card.look()
    assert done == ["unload", "gc", "load back"]
    card.busy = True
    card.look()
    card.load_back()  # somebody draws
    card.load_back()
    assert done[3:] == ["unload", "gc", "load back"]
    settings.devices = ("cuda:1",)  # another card
    assert not card.shares_card()
    settings.devices = ("cuda:0",)
    assert card.shares_card()
    wants["personalize_unload"] = False
    card.look()
    stubs["modules.sd_models"].model_data.sd_model = None
    wants["personalize_unload"] = True
    card.look()
    assert done[6:] == [] and card.is_away, "nothing was loaded, and nothing is for that"
    stubs["modules.devices"].device.type = "cpu"
    assert not card.shares_card()


def test_a_training_is_seen(stubs: dict[str, Any], busy: Service, tmp_path: Path) -> None:
    """In the jobs of a real service: it runs, and is over."""
    from fronts import settings_for
    from personalize_studio import Bridge

    card = Card(Bridge(lambda: settings_for(tmp_path, busy.address), "/personalize"), lambda _: True)
    assert not card.is_training()
    dataset = busy.client.post("/api/datasets", files=[("files", ("a.png", png(64), "image/png"))]).json()["id"]
    busy.client.post("/api/jobs", json={"settings": {**SHORT, "folder": dataset}}).raise_for_status()
    wait(card.is_training, bool)
    wait(card.is_training, lambda runs: not runs)
    stubs["modules.sd_models"].done.clear()


def test_an_answer_to_what_is_unknown(stubs: dict[str, Any]) -> None:
    module = load_script()
    with pytest.raises(Refusal) as refused:
        module.bridge.actions["lora"]({})
    assert refused.value.status == 404
    assert json.dumps(module.bridge.status())
