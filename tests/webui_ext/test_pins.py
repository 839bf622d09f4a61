"""The extension under the gradio, FastAPI and pydantic of each host, in environments of their own, driven in Chromium.

make test-hosts      # makes the environments in .cache/hosts (or $PERSONALIZE_HOST_VENVS), some 300 MB each, and runs this
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import wait

from personalize.service.serve import listen

ROOT = Path(__file__).resolve().parents[2]
OLD = ("huggingface_hub<0.26", "numpy<2", "pillow<11", "jinja2<3.1.5")
# What each host pins, and what these versions need beside them
PINS = {
    "a1111": ("gradio==3.41.2", "fastapi==0.94.0", "pydantic<2", "gradio_client==0.5.0", "httpx==0.24.1", "httpcore==0.15",
              "h11==0.12.0", "anyio<4", "setuptools<81", "matplotlib<3.9", *OLD),
    "forge": ("gradio==4.40.0", "fastapi==0.104.1", "pydantic==2.8.2", *OLD),
    "neo": ("gradio==4.40.0", "fastapi==0.127.0", "pydantic==2.10.6", "huggingface_hub<0.36", "pillow<11",
            "audioop-lts; python_version >= '3.13'"),
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")]


def make_environment(name: str) -> Path:
    """The Python of an environment with a host's pins; made once."""
    place = Path(os.environ.get("PERSONALIZE_HOST_VENVS", ROOT / ".cache" / "hosts")) / name
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS[name]], check=True)
        (place / "ready").touch()
    return python


def free_port() -> int:
    with listen("127.0.0.1", 0) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(params=sorted(PINS))
def ui(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A host with the extension, which finds a Python with this checkout."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environ |= {"PERSONALIZE_PYTHON": str(python), "PERSONALIZE_WORKSPACE": str(tmp_path / "workspace")}
    port, main = free_port(), Path(__file__).with_name("host_main.py")
    command = [make_environment(request.param), main, ROOT / "webui_ext" / "a1111", tmp_path / "host", str(port)]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environ, text=True)
        try:
            wait(lambda: child.poll() is None and "ready" in (tmp_path / "log").read_text(), bool, 60)
            yield child, port
        finally:
            child.kill()
            child.wait()
            print((tmp_path / "log").read_text())


def test_the_tab(ui: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    """The service starts when the tab is opened; the studio works inside; the host is killed, and nothing is left."""
    from playwright.sync_api import expect, sync_playwright

    child, port = ui
    leases = tmp_path / "workspace" / "uis"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("PERSONALIZE_CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        tabs = page.locator("#tabs > .tab-nav > button, #tabs [role=tab]")
        expect(tabs).to_have_count(2, timeout=30_000)
        page.wait_for_timeout(2500)
        assert not leases.exists(), "nobody has asked for the studio yet"
        tabs.filter(has_text="Personalize").click()
        frame = page.frame_locator("#personalize_frame")
        expect(frame.locator("h1")).to_contain_text("Show it what you love", timeout=60_000)
        frame.locator("form.sample button").first.click()  # the studio's own forms, through the host
        base: Any = frame.locator("[name=base]").first
        expect(base).to_have_value("pocket", timeout=60_000)
        page.evaluate("window.dispatchEvent(new MessageEvent('message', {data: {personalize: 'prompt', name: 'no'}}))")
        frame.locator("body").evaluate(
            "parent.postMessage({personalize: 'prompt', name: 'rex', trigger: 'zwx', weight: 0.8}, '*')"
        )
        expect(page.locator("#txt2img_prompt textarea")).to_have_value("zwx <lora:rex:0.8>")  # and not of a stranger's message
        browser.close()
    assert faults == [] and list(leases.glob("*.lease"))
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    wait(lambda: str(leases) in processes(), lambda alive: not alive, 30)


def processes() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
