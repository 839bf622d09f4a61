"""The private environment: what is run to make it, how far it is, and that it goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fronts import fronting
from personalize_studio import Settings, environment
from personalize_studio.environment import begin, read_state, read_tail, steps
from servers import wait

# An installer that writes down how it was called, and makes the Python of an environment as `uv venv` does
UV = """#!/bin/sh
echo "$@" >> {log}
[ -f {fail} ] && {{ echo "No space left on device" >&2; exit 3; }}
[ -f {slow} ] && sleep 600
if [ "$1" = venv ]; then
    for place in "$@"; do :; done
    mkdir -p "$place/bin" && printf '#!/bin/sh\\necho checked "$@" >> {log}\\n' > "$place/bin/python"
    chmod +x "$place/bin/python"
fi
"""


class Fake:
    """A folder with a plugin and an installer that does nothing."""

    def __init__(self, place: Path) -> None:
        self.home, self.bin = place / "plugin", place / "bin"
        self.log, self.fail, self.slow = place / "log", place / "fail", place / "slow"
        for folder in (self.home, self.bin):
            folder.mkdir()
        uv = self.bin / "uv"
        uv.write_text(UV.format(log=self.log, fail=self.fail, slow=self.slow))
        uv.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def state(self) -> str:
        return str(read_state(self.home)["state"])


pytestmark = pytest.mark.skipif(os.name == "nt", reason="the installer is a shell script")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    for name in ("PYTHONPATH", "PIP_TARGET", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/of/the/host")
    return fake


def test_it_is_made_by_uv(fake: Fake) -> None:
    child = begin(fake.home, "/src/personalize", "https://torch.example/cpu")
    assert child.wait(30) == 0 and child.stdin
    child.stdin.close()
    place = fake.home / "environment"
    assert fake.calls == [
        f"venv --python {sys.executable} {place}",
        f"pip install --python {place}/bin/python --index-url https://torch.example/cpu torch",
        f"pip install --python {place}/bin/python /src/personalize[serve,dataset]",
        "checked -c import personalize.service.serve, torch",
    ]
    assert read_state(fake.home) == {"state": "ready", "error": "", "package": "/src/personalize"}
    assert "$ " in read_tail(fake.home / "environment.log")


def test_it_goes_on_after_a_failure(fake: Fake) -> None:
    """What failed is told with its log; the next try begins with what is missing."""
    fake.fail.touch()
    child = begin(fake.home, "/src/personalize", "")
    assert child.wait(30) == 1 and child.stdin
    child.stdin.close()
    assert read_state(fake.home)["error"] == "making an environment ended with exit status 3"
    log = read_tail(fake.home / "environment.log")
    assert "No space left" in log and "make room" in environment.hint_for(log)
    fake.fail.unlink()
    child = begin(fake.home, "/src/personalize", "")
    assert child.wait(30) == 0 and child.stdin
    child.stdin.close()
    child = begin(fake.home, "/src/personalize", "")
    assert child.wait(30) == 0 and child.stdin
    child.stdin.close()
    assert sum(call.startswith("venv") for call in fake.calls) == 2  # the one that failed, and the one that did not


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_it_ends_with_who_started_it(fake: Fake) -> None:
    """Killed as hard as can be, the UI leaves no installer behind; that is told as an interruption."""
    fake.slow.touch()
    code = "import sys,time; from pathlib import Path; from personalize_studio.environment import begin; "
    code = f"import sys; sys.path.insert(0, {str(Path(environment.__file__).parent.parent)!r}); {code}"
    code += f"child = begin(Path({str(fake.home)!r}), '/src', ''); print(child.pid, flush=True); time.sleep(600)"
    ui = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert ui.stdout
    maker = int(ui.stdout.readline())
    wait(lambda: fake.calls, bool, 20)
    assert fake.state() == "running"
    ui.kill()
    ui.wait()
    ui.stdout.close()
    wait(lambda: fake.state(), lambda state: state == "failed", 20)
    assert "interrupted" in read_state(fake.home)["error"]
    wait(lambda: Path(f"/proc/{maker}").exists(), lambda there: not there, 20)
    assert str(fake.home) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_pip_brings_uv_where_python_makes_no_environments(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ComfyUI's portable folder: nothing is put into its own packages."""
    monkeypatch.setattr(environment, "can_make", lambda: False)
    first, second, *_ = steps(fake.home, "/src", "", None)
    assert first.command[1:] == ["-m", "pip", "install", "--upgrade", "--target", str(fake.home / "uv"), "uv"]
    assert second.command == [
        str(fake.home / "uv" / "bin" / "uv"),
        "venv",
        "--python",
        ">=3.11,<3.14",
        str(fake.home / "environment"),
    ]


def test_venv_and_pip_do_without_uv(fake: Fake) -> None:
    made, *_, last, checked = (step.command for step in steps(fake.home, "/src", "", None))
    assert made == [sys.executable, "-m", "venv", str(fake.home / "environment")]
    assert last[1:4] == ["-m", "pip", "install"] and last[-1] == "/src[serve,dataset]" and checked[1] == "-c"


def test_the_panel_says_the_size_first_and_then_makes_it(fake: Fake) -> None:
    settings = Settings(fake.home, workspace=str(fake.home / "workspace"), package="/src/personalize", index="none")
    with fronting(settings) as front:

        def status() -> Any:
            return front.client.get("/-/status").json()

        first = status()
        assert first["state"] == "missing" and first["disk"] > first["download"] > 1 << 28 and first["free"] > 0
        assert first["how"] == "uv" and first["source"] == "/src/personalize" and not fake.calls
        assert first["place"] == str(fake.home / "environment")
        fake.slow.touch()
        assert front.client.post("/-/install").json()["state"] == "installing"
        wait(lambda: fake.calls, bool, 20)
        running = status()
        assert running["state"] == "installing" and running["step"] == 0 and running["doing"] == "making an environment"
        assert "venv" in running["log"]
        assert front.client.post("/-/install").json()["state"] == "installing" and len(fake.calls) == 1
        stopped = front.client.post("/-/cancel").json()
        assert stopped["state"] == "failed" and stopped["again"] == "install" and "kept" in stopped["what"]
        fake.slow.unlink()
        front.client.post("/-/install")
        wait(status, lambda now: now["state"] == "stopped", 30)
        failed = front.client.post("/-/start").json()  # its python is no python
        assert failed["state"] == "failed" and failed["again"] == "start"
        assert json.loads((fake.home / "environment.json").read_text())["state"] == "ready"


def test_without_anything_to_install_nothing_is_run(fake: Fake) -> None:
    with fronting(Settings(fake.home, workspace=str(fake.home / "workspace"))) as front:
        status = front.client.get("/-/status").json()
        assert (status["state"], status["source"]) == ("missing", "")
        answer = front.client.post("/-/install")
        assert answer.status_code == 409 and "PERSONALIZE_PACKAGE" in answer.json()["error"]["hint"] and not fake.calls


def test_a_newer_wheel_is_installed_by_the_same_button(fake: Fake) -> None:
    for version in ("1", "2"):
        wheel = fake.home / f"personalize-{version}-py3-none-any.whl"
        wheel.touch()
        os.utime(wheel, (int(version), int(version)))
        with fronting(Settings(fake.home, workspace=str(fake.home / "workspace"), index="default")) as front:
            before = front.client.get("/-/status").json()
            assert (before["state"], before["source"]) == ("missing", str(wheel))
            front.client.post("/-/install")
            wait(lambda front=front: front.client.get("/-/status").json()["state"], lambda state: state == "stopped", 30)
    assert [call.rpartition("/")[2] for call in fake.calls if "whl" in call] == [
        f"personalize-{version}-py3-none-any.whl[serve,dataset]" for version in ("1", "2")
    ]
