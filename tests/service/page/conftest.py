"""A studio in a real server, and a real browser that looks at it and complains about whatever goes wrong there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Service, serving

from personalize.service.options import Options

CHROMIUM = os.environ.get("PERSONALIZE_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
VIOLATIONS = """document.addEventListener("securitypolicyviolation", (event) =>
    console.error(`refused by the policy: ${event.violatedDirective} ${event.blockedURI}`))"""


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A studio that runs its jobs, with an image UI to send adapters to."""
    root = tmp_path_factory.mktemp("studio")
    (loras := root / "ComfyUI" / "models" / "loras").mkdir(parents=True)
    with serving(Options(root / "workspace", hosts=(loras,)), ("cpu",)) as service:
        yield service


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser."""
    api = pytest.importorskip("playwright.sync_api", reason="the page is tested with `pip install playwright`")
    if not Path(CHROMIUM).is_file():
        pytest.skip("there is no Chromium: PERSONALIZE_CHROMIUM names one, Debian has it as `chromium`")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, studio: Service) -> Iterator[Any]:
    """A tab. At the end, nothing may have gone wrong in it that a test did not expect: `page.faults`."""
    context = chromium.new_context(base_url=studio.address, viewport={"width": 1200, "height": 900})
    context.set_default_timeout(60_000)
    tab = context.new_page()
    tab.add_init_script(VIOLATIONS)
    faults: list[str] = []
    tab.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.faults = faults
    yield tab
    context.close()
    assert faults == []
