"""The service as UIs use it: started on demand, shared, and gone with the last of them, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from personalize_studio import Settings
from personalize_studio.lease import Lease, alone, is_needed, lock
from personalize_studio.service import Service, StartError, ask, hint_for, make_token, register
from personalize_studio.settings import VARIABLES, default_workspace
from servers import wait

from personalize.jobs.workspace import default_place

PLUGIN = Path(__file__).resolve().parents[2] / "webui_ext" / "a1111"
# A UI: it starts the service, says where it is, and lives until it is killed
UI = """
import sys, time; from pathlib import Path
sys.path.insert(0, sys.argv[1])
from personalize_studio import Settings
from personalize_studio.service import Service
home, python, place, *folders = sys.argv[2:]
service = Service(Settings(Path(home), python=python, workspace=place, devices=("cpu",), folders=tuple(folders)))
print(service.start().url, flush=True)
time.sleep(600)
"""


def settings(home: Path, python: str, **more: Any) -> Settings:
    given: dict[str, Any] = {"python": python, "workspace": str(home / "workspace"), "devices": ("cpu",)} | more
    return Settings(home, **given)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A private Python with this checkout, which PYTHONPATH is no way to tell it: that is not passed on."""
    return make_python(tmp_path_factory.mktemp("python") / "python", f"PYTHONPATH={PLUGIN.parent.parent} exec {sys.executable}")


def make_python(path: Path, command: str) -> str:
    path.write_text(f'#!/bin/sh\n{command} "$@"\n')
    path.chmod(0o755)
    return str(path)


def open_ui(tmp_path: Path, python: str, *folders: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", UI, str(PLUGIN), str(tmp_path), python, str(tmp_path / "workspace"), *map(str, folders)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_two_uis_share_one_and_none_is_left(tmp_path: Path, python: str) -> None:
    """Killed as hard as can be: while one lives the service does, then it is gone; its log and its lock say so too."""
    folders = tmp_path / "one" / "models" / "Lora", tmp_path / "two" / "models" / "loras"
    for folder in folders:
        folder.mkdir(parents=True)
    uis = [open_ui(tmp_path, python, folder) for folder in folders]
    try:
        first, second = (ui.stdout.readline().strip() for ui in uis if ui.stdout)
        assert first == second and first.startswith("http://127.0.0.1:")
        service = Service(settings(tmp_path, python))
        upstream = service.look()
        assert upstream and upstream.url == first and len(upstream.token) > 20
        with ask(upstream, "/api/hosts") as answer:
            assert {one["name"] for one in json.load(answer)["data"]} == {"A1111 or Forge", "ComfyUI"}
        process = json.loads((tmp_path / "workspace" / ".lock").read_text())["pid"]
        uis[0].kill()
        uis[0].wait()
        time.sleep(4.5)
        assert service.look(), "the other one needs it"
        uis[1].kill()
        uis[1].wait()
        wait(lambda: is_alive(process), lambda alive: not alive, 30)
        assert service.look() is None and not list(service.leases.glob("*.lease"))
    finally:
        for ui in uis:
            ui.kill()
            ui.wait()
            assert ui.stdout
            ui.stdout.close()


def test_a_service_that_was_killed_is_started_again(tmp_path: Path, python: str) -> None:
    """What it left, its address and its lock, leads nobody astray."""
    service = Service(settings(tmp_path, python))
    try:
        first = service.start()
        assert service.start() == first and service.find() == first
        assert service.child
        service.child.kill()
        service.child.wait()
        service.forget()
        assert service.find() is None
        again = service.start()
        assert again.url != first.url and again.token == first.token
        assert oct((tmp_path / "workspace" / "token").stat().st_mode)[-2:] == "00" or os.name == "nt"
        service.stop()
        assert service.child.wait(30) == 0
    finally:
        service.stop()
        if service.child and service.child.poll() is None:
            service.child.kill()
            service.child.wait()


@pytest.mark.parametrize(
    ("python", "what", "hint"),
    [
        ("/nowhere/python", "there is no /nowhere/python", "make an environment"),
        ("bad", "did not start", "pip install"),
        (str(Path(__file__)), "cannot be run: Permission denied", "name a Python"),
    ],
)
def test_a_failed_start_says_why(tmp_path: Path, python: str, what: str, hint: str) -> None:
    if python == "bad":  # a Python without personalize
        python = make_python(tmp_path / "python", f"exec {sys.executable} -S -I")
    service = Service(settings(tmp_path, python))
    with pytest.raises(StartError) as failed:
        service.start()
    assert what in failed.value.what and hint in failed.value.hint and service.error is failed.value
    assert what != "did not start" or "No module named" in failed.value.log
    service.stop()


def test_somebody_elses_workspace(tmp_path: Path, python: str) -> None:
    from personalize.lock import hold

    (tmp_path / "workspace").mkdir()
    with hold(tmp_path / "workspace", ""):
        service = Service(settings(tmp_path, python))
        with pytest.raises(StartError) as failed:
            service.start()
        service.stop()
    assert "another program serves this workspace" in failed.value.hint and "in use" in failed.value.log


def test_only_this_workspace_in_use_is_a_workspace_in_use(tmp_path: Path) -> None:
    given = settings(tmp_path, "")
    assert "another program serves" in hint_for(f"{given.place} is in use: by process 7", given)
    assert "the log says why" in hint_for("the camera is in use: by process 7", given)


def test_a_python_without_personalize_is_told_what_to_install(tmp_path: Path) -> None:
    """Not by its bare name, which no index knows: the wheel that lies beside the plugin, into the Python that was named."""
    wheel = tmp_path / "personalize-0.2.0-py3-none-any.whl"
    wheel.touch()
    hint = hint_for("ImportError: No module named personalize", settings(tmp_path, "/usr/bin/python3"))
    assert f"/usr/bin/python3 -m pip install '{wheel}[serve]'" in hint


@pytest.mark.skipif(os.name == "nt", reason="other names there")
def test_a_python_may_be_named_as_people_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its file, by its environment's folder, in quotes, or as a command; what is none of these is shown as it was meant."""
    python = tmp_path / "my environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(python.parent))
    for named in (str(python), str(python.parent.parent), f'"{python}"', "python"):
        assert settings(tmp_path, named).interpreter == python, named
    assert settings(tmp_path, str(tmp_path)).interpreter == tmp_path


def test_a_lease_ends_with_its_holder(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "uis")
    assert is_needed(tmp_path / "uis")
    with alone(tmp_path / "x.lock", 0) as mine, alone(tmp_path / "x.lock", 0.1) as also:
        assert mine and not also
    lease.release()
    lease.release()
    assert not is_needed(tmp_path / "uis")
    (tmp_path / "uis" / "dead.lease").touch()
    assert not is_needed(tmp_path / "uis") and not list((tmp_path / "uis").glob("*.lease"))
    handle = lock(tmp_path / "y")
    assert handle is not None and lock(tmp_path / "y") is None
    os.close(handle)


def test_the_workspace_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PERSONALIZE_WORKSPACE")
    assert default_workspace() == default_place()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_workspace() == default_place()


def test_the_environment_has_the_last_word(tmp_path: Path) -> None:
    given = Settings(tmp_path, python="/a", workspace="/b").with_environment(
        {name: f" /of/{name} " for name in VARIABLES.values()}
    )
    assert {field: getattr(given, field) for field in VARIABLES} == {field: f"/of/{name}" for field, name in VARIABLES.items()}
    assert Settings(tmp_path, python="/a").with_environment({"PERSONALIZE_PYTHON": " "}).python == "/a"
    assert given.interpreter == Path("/of/PERSONALIZE_PYTHON") and given.place == Path("/of/PERSONALIZE_WORKSPACE")


def test_what_is_installed(tmp_path: Path) -> None:
    """What is named, a wheel beside the plugin, or the checkout around it; never whatever has that name somewhere."""
    assert Settings(tmp_path).source == ""
    assert Settings(PLUGIN).source == str(PLUGIN.parent.parent)
    link = tmp_path / "extensions"
    link.symlink_to(PLUGIN)
    assert Settings(link).source == str(PLUGIN.parent.parent)
    (tmp_path / "personalize-1-py3-none-any.whl").touch()
    assert Settings(tmp_path).source.endswith(".whl") and Settings(tmp_path, package="/x").source == "/x"


def test_folders_are_registered_once(tmp_path: Path) -> None:
    for folders in (("/a", "/b"), ("/b", "/c")):
        register(tmp_path, folders)
    assert json.loads((tmp_path / "folders.json").read_text()) == ["/a", "/b", "/c"]
    assert make_token(tmp_path) == make_token(tmp_path)
    assert signal.SIGTERM
