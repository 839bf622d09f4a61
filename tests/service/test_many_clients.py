"""A server under load: two hundred clients while a job trains, of whom none loses an event, and a day of work in one go.

Prints p99, memory, and what training loses.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import pytest
from loops import run_coroutine
from servers import SHORT, pictures, wait, zipped

CLIENTS = 200
STEPS = 200
WINDOW = 6.0  # seconds in which all clients ask, and as many in which none does: training is compared between the two
PAUSE = 2.0  # seconds between two lists of a client


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The command itself, in a process of its own: its address and process id."""
    command = [sys.executable, "-m", "personalize", "serve", "--workspace", str(tmp_path / "w"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout
        yield process.stdout.readline().split()[-1], process.pid
        process.terminate()
        assert process.wait(60) == 0


def memory(process: int) -> tuple[int, int]:
    """Bytes that a process has now, and the most it ever had."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


class Crowd:
    """Clients that stream a job's events to its end, and list jobs while they may."""

    def __init__(self, address: str, job: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False)
        self.job, self.asking, self.over = job, asyncio.Event(), asyncio.Event()
        self.seconds: list[float] = []
        self.windows: list[tuple[float, float]] = []

    async def stream(self) -> list[int]:
        """The numbers of all events that a client got; the last one is 0, of the end."""
        numbers, id = [], 0
        headers = {"Accept": "text/event-stream"}
        async with self.client.stream("GET", f"/api/jobs/{self.job}/events", headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    id = int(line[4:])
                elif not line and id:
                    numbers.append(id)
                    id = 0
                elif line == "event: end":
                    numbers.append(0)
        return numbers

    async def list(self, number: int) -> None:
        """Ask for the jobs, again and again."""
        await asyncio.sleep(number * PAUSE / CLIENTS)
        while not self.over.is_set():
            await self.asking.wait()
            begun = time.monotonic()
            answer = await self.client.get("/api/jobs")
            self.seconds.append(time.monotonic() - begun)
            assert answer.status_code == 200 and answer.json()["data"]
            await asyncio.sleep(PAUSE)

    async def alternate(self) -> None:
        """Windows in which clients ask, and such in which they do not."""
        while not self.over.is_set():
            self.asking.set()
            begun = time.time()
            await asyncio.sleep(WINDOW)
            self.asking.clear()
            self.windows.append((begun + 1, time.time()))
            await asyncio.sleep(WINDOW)

    async def run(self) -> list[list[int]]:
        """All of it, until the job is over."""
        async with self.client:
            others = [asyncio.create_task(self.list(number)) for number in range(CLIENTS)]
            others.append(asyncio.create_task(self.alternate()))
            streams = await asyncio.gather(*(self.stream() for _ in range(CLIENTS)))
            self.over.set()
            self.asking.set()
            await asyncio.gather(*others[:-1])
            others[-1].cancel()
        return streams


@pytest.mark.slow
def test_many_clients_while_a_job_trains(served: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    address, process = served
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        dataset = client.post("/api/datasets", files={"files": ("rex.zip", zipped(pictures()))}).json()["id"]
        given = {**SHORT, "folder": dataset, "steps": STEPS, "checkpoint_every": 0, "resolution": 64, "batch_size": 4}
        job = client.post("/api/jobs", json={"kind": "train", "settings": given}).json()["id"]
        wait(lambda: client.get(f"/api/jobs/{job}").json()["progress"].get("done", 0), lambda done: done >= 5)
        before = memory(process)[0]
        crowd = Crowd(address, job)
        streams = run_coroutine(crowd.run())
        events: list[Any] = client.get(f"/api/jobs/{job}/events", params={"limit": 10_000}).json()["data"]
        after, peak = memory(process)
        assert client.get(f"/api/jobs/{job}").json()["state"] == "succeeded"
    expected = [*range(1, len(events) + 1), 0]
    assert [numbers for numbers in streams if numbers != expected] == []
    steps = [(one["at"], one["seconds"]) for one in events if one["event"] == "step" and one["step"] > 10]
    inside = [any(low <= at <= high for low, high in crowd.windows) for at, _ in steps]
    asked = [seconds for (_, seconds), within in zip(steps, inside, strict=True) if within]
    calm = [seconds for (_, seconds), within in zip(steps, inside, strict=True) if not within]
    with capsys.disabled():
        print(f"\n{CLIENTS} clients: {len(crowd.seconds)} lists, median {1000 * median(crowd.seconds):.0f} ms, ", end="")
        print(f"p99 {1000 * quantiles(crowd.seconds, n=100)[-1]:.0f} ms; {len(events)} events to each, none lost; ", end="")
        print(f"server {before / 1e6:.0f} -> {after / 1e6:.0f} MB, at most {peak / 1e6:.0f} MB; ", end="")
        if asked and calm:
            print(f"a step takes {1000 * median(asked):.1f} ms while they list, {1000 * median(calm):.1f} ms while they do not")


ROUNDS = 240  # of everything that a studio does in a day: a person does about as much in one
QUARTER = ROUNDS // 4
GROWTH = 16 << 20  # bytes that a process may have more at the end than after the first half


def processes_of(process: int) -> dict[str, int]:
    """The memory of a server and of its workers, in bytes, by what they are."""
    children = [child for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]
    lanes = {child: Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children}
    named = {next((word for word in words if word.startswith("cpu/")), ""): int(child) for child, words in lanes.items()}
    return {"server": memory(process)[0]} | {name: memory(child)[0] for name, child in named.items() if name == "cpu/quick"}


def do_a_round(client: httpx.Client, number: int) -> None:
    """Pictures come, are looked at and captioned, are drawn with, now and then learned, and go away."""
    dataset = client.post("/api/datasets", files={"files": ("rex.zip", zipped(pictures()))}).json()["id"]
    assert client.post(f"/api/datasets/{dataset}/check", json={}).status_code == 200
    names = client.get(f"/api/datasets/{dataset}/captions").json()["captions"]
    client.put(f"/api/datasets/{dataset}/captions", json={"captions": dict.fromkeys(names, f"a cat, {number}")})
    for path in ("/", f"/dataset/{dataset}", f"/dataset/{dataset}/frames", f"/train/{dataset}", "/library", "/jobs", "/api/jobs"):
        assert client.get(path).status_code == 200, path
    asked = {"model": "pocket", "prompt": f"a red cat, {number}", "steps": 2, "seed": number}
    assert len(client.post("/v1/images/generations", json=asked).json()["data"]) == 1
    if number % 20 == 0:
        given = {**SHORT, "folder": dataset, "steps": 1, "checkpoint_every": 0}
        job = client.post("/api/jobs", json={"kind": "train", "settings": given}).json()["id"]
        wait(lambda: client.get(f"/api/jobs/{job}").json()["state"], "succeeded".__eq__, 300)
    assert client.delete(f"/api/datasets/{dataset}").status_code == 200


@pytest.mark.slow
def test_memory_stays_flat_over_a_days_work(served: tuple[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    address, process = served
    held: list[dict[str, int]] = []
    with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
        for number in range(1, ROUNDS + 1):
            do_a_round(client, number)
            if number % QUARTER == 0:
                held.append(processes_of(process))
                with capsys.disabled():
                    told = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in held[-1].items())
                    print(f"\nafter {number} of {ROUNDS} rounds: {told}", end="", flush=True)
    assert held[-1].keys() == {"server", "cpu/quick"}
    assert {name: size - held[1][name] for name, size in held[-1].items() if size - held[1][name] > GROWTH} == {}
