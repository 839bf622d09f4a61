"""Real servers on loopback: one that runs jobs, and one that only takes them."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from personalize.service.options import Limits, Options
from personalize.service.serve import listen, make_server
from personalize.service.studio import Studio


class Service:
    """A server in a thread, and how it is reached."""

    def __init__(self, studio: Studio, address: str) -> None:
        self.studio, self.address = studio, address
        self.client = httpx.Client(base_url=address, timeout=60, trust_env=False)

    @property
    def root(self) -> Path:
        return self.studio.workspace.root


@contextlib.contextmanager
def serving(options: Options, lanes: tuple[str, ...] = ()) -> Iterator[Service]:
    """A server that is ready, and gone at the end."""
    with listen(options.host, 0) as sock:
        ready, studio = threading.Event(), Studio.open(options, lanes)
        server = make_server(studio, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert ready.wait(30)
            service = Service(studio, f"http://127.0.0.1:{sock.getsockname()[1]}")
            with service.client:
                yield service
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


SMALL = Limits(body=100_000, upload=3_000_000, unpacked=4_000_000, files=40, pixels=1_000_000, text=10_000, metadata=10_000)


@pytest.fixture(scope="session")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose jobs wait, with small limits, and a folder that the user named."""
    named = tmp_path_factory.mktemp("named")
    options = Options(tmp_path_factory.mktemp("idle") / "workspace", folders=(named,), limits=SMALL)
    with serving(options) as service:
        yield service


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that runs its jobs, as `personalize serve` does."""
    with serving(Options(tmp_path_factory.mktemp("busy") / "workspace"), ("cpu",)) as service:
        yield service


def png(side: int = 32, colour: tuple[int, int, int] = (200, 60, 90), width: int | None = None) -> bytes:
    """A picture as bytes."""
    image = Image.linear_gradient("L").resize((width or side, side)).convert("RGB")
    image.paste(colour, (2, 2, max(3, side // 2), max(3, side // 2)))
    image.save(out := io.BytesIO(), format="PNG")
    return out.getvalue()


def zipped(files: dict[str, bytes | str], change: Callable[[zipfile.ZipInfo], None] = lambda _: None) -> bytes:
    """An archive; `change` may spoil each entry."""
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            change(info)
            archive.writestr(info, data)
    return out.getvalue()


def pictures(count: int = 3) -> dict[str, bytes | str]:
    """Pictures with captions, each another one."""
    found: dict[str, bytes | str] = {}
    for number in range(count):
        found |= {f"{number}.png": png(64, (40 * number, 200, 90)), f"{number}.txt": f"zwx cat, number {number}"}
    return found


# The least of everything
SHORT = {"steps": 3, "batch_size": 1, "rank": 2, "resolution": 32, "checkpoint_every": 2, "choose": "none", "sample_every": 0,
         "sample_prompts": ["{trigger}"], "sample_seeds": [0], "sample_steps": 1, "class": "cat", "trigger": "zwx"}  # fmt: skip


def wait(look: Callable[[], Any], good: Callable[[Any], bool], seconds: float = 120) -> Any:
    """What `look` sees as soon as it is good."""
    end = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def ended(client: openai.OpenAI, job: str) -> Any:
    return wait(lambda: client.fine_tuning.jobs.retrieve(job), lambda one: one.status in ("succeeded", "failed", "cancelled"))


@pytest.fixture(scope="session")
def client(busy: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{busy.address}/v1", api_key="none is needed", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def archive(client: openai.OpenAI) -> Any:
    return client.files.create(file=("rex.zip", zipped(pictures())), purpose="fine-tune")


@pytest.fixture(scope="session")
def trained(client: openai.OpenAI, archive: Any) -> Any:
    """A training from its creation to its end."""
    job = client.fine_tuning.jobs.create(
        model="pocket", training_file=archive.id, suffix="Rex", seed=7, metadata={"team": "red"}, extra_body=SHORT
    )
    assert job.status in ("queued", "running") and job.seed == 7 and job.fine_tuned_model is None
    assert job.training_file == archive.id and job.metadata == {"team": "red"}
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    return done
