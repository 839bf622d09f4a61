"""The command: what it says when it is ready, how it ends, and what it says when it cannot begin."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from personalize.cli import run
from personalize.jobs import Engine, Workspace
from personalize.service.serve import listen


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_ends_when_it_is_asked_to(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "personalize", "serve", "--workspace", str(tmp_path / "w"), "--port", "0"]
    environment = {key: value for key, value in os.environ.items() if key != "PERSONALIZE_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout and process.stderr
        address = process.stdout.readline().split()[-1]
        assert httpx.get(f"{address}/health", trust_env=False).json()["status"] == "ok"
        process.send_signal(how)
        assert (process.wait(60), process.stderr.read()) == (0, "")


def test_a_port_or_workspace_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "--workspace", str(tmp_path / "w"), "--port", port]) == 2
    assert "choose another --port" in capsys.readouterr().err
    engine = Engine(Workspace(tmp_path / "w"), ())
    with engine:
        assert run(["serve", "--workspace", str(tmp_path / "w"), "--port", "0", "--device", "cpu"]) == 2
    assert "is in use" in capsys.readouterr().err
    assert run(["serve", "--workspace", str(tmp_path / "w"), "--folder", str(tmp_path / "nothing")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_answers_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off on such sockets alone: else each answer waits 40 ms for the last one's ACK."""
    with listen("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules: Any = sys.modules
    for name in [name for name in modules if name.startswith(("personalize.service", "uvicorn"))]:
        monkeypatch.delitem(modules, name)
    monkeypatch.setitem(modules, "uvicorn", None)
    assert run(["serve", "--workspace", str(tmp_path / "w")]) == 2
    assert "pip install 'personalize[serve]'" in capsys.readouterr().err


def test_a_second_service_leaves_the_first_ones_uploads_alone(tmp_path: Path) -> None:
    from personalize.service.options import Options
    from personalize.service.studio import Studio

    workspace = Workspace(tmp_path / "w")
    (half := workspace.uploads / ".incoming-1").mkdir()
    with Engine(workspace, ()):
        assert run(["serve", "--workspace", str(tmp_path / "w"), "--port", "0", "--device", "cpu"]) == 2
    assert half.is_dir()  # somebody is sending it
    Studio.open(Options(tmp_path / "w")).remove_leftovers()
    assert not half.exists()
