"""The service's own routes: jobs and their events, forms, adapters, and paths that stay inside."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import SHORT, Service, pictures, png, zipped

from personalize.jobs.store import kind_of
from personalize.recipe.settings import settings
from personalize.registry import table
from personalize.service.openai.names import job_id
from personalize.service.requests import LEFT_OUT, job_schema
from tools.pocket.world import Scene, render


def upload(service: Service, name: str = "rex") -> str:
    answer = service.client.post("/api/datasets", files={"files": (f"{name}.zip", zipped(pictures()))})
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def dataset(idle: Service) -> str:
    return upload(idle)


def add(service: Service, kind: str, given: dict[str, Any], **more: Any) -> Any:
    return service.client.post("/api/jobs", json={"kind": kind, "settings": given, **more})


def refusal(answer: Any) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# ---------------------------------------------------------------- the queue


def test_the_queue_is_seen_and_changed(idle: Service, dataset: str) -> None:
    first, second, third = (add(idle, "train", {"folder": dataset, **SHORT}, name=f"job {n}").json() for n in range(3))
    assert first["state"] == "queued" and first["settings"]["folder"] == str(idle.studio.datasets.folder(dataset))
    listed = idle.client.get("/api/jobs", params={"state": "queued", "limit": 2}).json()
    assert [one["name"] for one in listed["data"]] == ["job 0", "job 1"] and listed["has_more"]
    rest = idle.client.get("/api/jobs", params={"state": "queued", "after": second["id"]}).json()
    assert [one["id"] for one in rest["data"]] == [third["id"]]
    moved = idle.client.patch(f"/api/jobs/{third['id']}", json={"before": first["id"], "name": "first now"}).json()
    assert moved["name"] == "first now"
    order = [one["id"] for one in idle.client.get("/api/jobs", params={"state": "queued"}).json()["data"]]
    assert order == [third["id"], first["id"], second["id"]]
    changed = idle.client.patch(
        f"/api/jobs/{first['id']}", json={"settings": {"folder": dataset, **SHORT, "rank": 3}, "priority": 5}
    )
    assert changed.json()["settings"]["rank"] == 3 and changed.json()["priority"] == 5
    assert refusal(idle.client.patch(f"/api/jobs/{first['id']}", json={"settings": {"folder": dataset, "rnak": 3}})) == (
        400, "recipe_error", "rnak",
    )  # fmt: skip
    for word, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("requeue", "queued")):
        assert idle.client.post(f"/api/jobs/{second['id']}/{word}").json()["state"] == state
    assert refusal(idle.client.post(f"/api/jobs/{second['id']}/requeue")) == (409, "job_error", None)
    assert refusal(idle.client.post(f"/api/jobs/{second['id']}/tell/sample")) == (409, "job_error", None)
    assert refusal(idle.client.get("/api/jobs/nothing"))[:2] == (404, "no_such_job_error")
    for one in (first, second, third):
        idle.client.post(f"/api/jobs/{one['id']}/cancel")


def test_nothing_is_queued_that_would_fail(idle: Service, dataset: str) -> None:
    before = len(idle.client.get("/api/jobs").json()["data"])
    wrong: list[tuple[str, dict[str, Any], tuple[int, str, str | None]]] = [
        ("trian", {}, (400, "recipe_error", None)),
        ("train", {"folder": dataset, "rank": 0}, (400, "recipe_error", "rank")),
        ("train", {"folder": dataset, "rnak": 4}, (400, "recipe_error", "rnak")),
        ("train", {"folder": "nothing-there"}, (404, "not_found", None)),
        ("train", {"folder": dataset, "preset": "pocket-sytle"}, (400, "recipe_error", None)),
        ("train", {"folder": dataset, "class": "cat", "base": "pokcet"}, (400, "base_model_error", None)),
        ("train", {}, (400, "missing", "folder")),
        ("merge", {"output": "x"}, (400, "missing", "files")),
        ("generate", {"prompts": []}, (400, "missing", "prompts")),
        ("merge", {"files": ["0123456789abcdef"]}, (404, "not_found", None)),
        ("generate", {"prompts": ["a cat"], "steps": 10**6}, (400, "too_many", "steps")),
        ("generate", {"prompts": ["a cat"], "size": "99999x2"}, (400, "too_large", "size")),
    ]
    for kind, given, expected in wrong:
        assert add(idle, kind, given).status_code >= 400, (kind, given)
        assert refusal(add(idle, kind, given)) == expected, (kind, given)
    assert "did you mean rank" in add(idle, "train", {"folder": dataset, "rnak": 4}).json()["error"]["message"]
    assert refusal(idle.client.post("/api/jobs", json={"kind": "train", "settings": {}, "sort": 1})) == (
        400,
        "invalid_value",
        "sort",
    )
    assert len(idle.client.get("/api/jobs").json()["data"]) == before


def test_what_is_wrong_with_a_request_is_told(idle: Service) -> None:
    message = idle.client.post("/v1/chat/completions", json={}).json()["error"]["message"]
    assert message.startswith("there is no route POST /v1/chat/completions")
    assert "Content-Type" in idle.client.post("/api/jobs", content=b'{"settings": {}}').json()["error"]["message"]
    assert idle.client.delete("/api/jobs").status_code == 405


def test_what_a_job_needs_is_not_removed(idle: Service, dataset: str) -> None:
    job = add(idle, "train", {"folder": dataset, **SHORT}).json()
    for path in (f"/api/datasets/{dataset}", f"/api/datasets/{dataset}/pictures/0.png"):
        assert refusal(idle.client.delete(path))[:2] == (409, "in_use")
    idle.client.post(f"/api/jobs/{job['id']}/cancel")
    assert idle.client.delete(f"/api/datasets/{dataset}/pictures/2.png").status_code == 200


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["/etc", "/", "~", "..", "../..", "datasets/../..", "/proc/self", "\0", "a" * 5000])
def test_paths_stay_inside(idle: Service, dataset: str, path: str) -> None:
    for kind, given in [
        ("train", {"folder": path}),
        ("train", {"folder": dataset, "base": path}),
        ("train", {"folder": dataset, "init": path}),
        ("train", {"folder": dataset, "vae": path}),
        ("train", {"folder": dataset, "regularization": path, "prior": "images"}),
        ("batch", {"folders": [dataset, path]}),
        ("dataset", {"folder": path}),
        ("caption", {"folder": path}),
        ("caption", {"folder": dataset, "model": path}),
        ("generate", {"prompts": ["a cat"], "image": path}),
        ("generate", {"prompts": ["a cat"], "stack": [f"{path}/x.safetensors:0.5"]}),
        ("generate", {"prompts": ["a cat"], "stack": [f"rex={path}/x.safetensors"]}),
        ("merge", {"files": [f"{path}/x.safetensors"]}),
        ("bake", {"base": path, "files": ["x.safetensors"]}),
        ("doctor", {"files": [f"{path}/x.safetensors"], "base": path}),
    ]:
        answer = add(idle, kind, given)
        good = [(403, "outside"), (400, "no_text"), (400, "bad_path"), (404, "not_found")]
        assert 400 <= answer.status_code < 500, (kind, given, answer.text)
        assert refusal(answer)[:2] in good or path == "~", (kind, given, answer.text)  # a name in the workspace, of nothing
    sent = idle.client.post("/api/adapters/0123456789abcdef/send", json={"folder": path})
    assert sent.status_code == 404


def test_no_setting_names_a_place_to_write_or_a_file_of_names(idle: Service, dataset: str, tmp_path: Path) -> None:
    (secret := tmp_path / "secret.txt").write_text("a secret\n")
    for kind, given in [
        ("train", {"folder": dataset, "output": str(tmp_path)}),
        ("train", {"folder": dataset, "origin": "x.safetensors"}),
        ("generate", {"prompts": ["a"], "output": "."}),  # which would be emptied before it is drawn into
        ("generate", {"prompts": ["a"], "lora_dir": "/"}),
        ("generate", {"prompts": ["a"], "listed": str(secret)}),
        ("merge", {"files": ["a"], "replay": str(secret)}),
        ("dataset", {"folder": dataset, "html_path": str(tmp_path / "x.html")}),
    ]:
        assert refusal(add(idle, kind, given))[:2] == (400, "recipe_error"), (kind, given)
    for name in ("../x", "a/b", "NUL", ".x", "/tmp/x"):
        assert refusal(add(idle, "merge", {"files": ["x.safetensors"], "output": name}))[0] in (400, 403, 404)
    for prompts in (f"@{secret}", str(secret), [f"@{secret}"], ["a cat", f" @{secret} "], "@~/x", "@/etc/passwd"):
        assert refusal(add(idle, "train", {"folder": dataset, "sample_prompts": prompts})) == (
            400,
            "file_prompt",
            "sample_prompts",
        )
        assert refusal(add(idle, "generate", {"prompts": prompts}))[:2] == (400, "file_prompt")
        assert refusal(idle.client.post("/v1/images/generations", json={"prompt": str(prompts[-1] if isinstance(prompts, list) else prompts)}))[:2] == (400, "file_prompt")  # fmt: skip  # noqa: E501


def test_every_text_that_names_something_is_known_to_be_one() -> None:
    """A new parameter of a command that is a plain text must be looked at: does it name a file?"""
    harmless = {
        "class", "trigger", "caption", "caption_prefix", "name", "memory", "sampler", "negative", "seeds", "axes", "targets",
        "parts", "text_targets", "holdout", "method", "dialect", "dtype", "family", "size", "output", "precision", "device",
        "backend", "revision", "prefix", "without", "prompt", "freeze", "lr_scale", "unfreeze", "init_word",
    }  # fmt: skip
    for kind in table("jobs"):
        for name, schema in job_schema(kind)["properties"].items():
            one = schema.get("items", schema)
            if one.get("type") == "string" and "enum" not in one and "const" not in one:
                assert one.get("format") in ("path", "adapter", "base", "captioner", "preset", "prompt") or name in harmless, (
                    kind,
                    name,
                )


def test_paths_inside_of_named_folders_are_taken(idle: Service) -> None:
    named = idle.studio.options.folders[0]
    (named / "photos").mkdir()
    for name, data in pictures(2).items():
        (named / "photos" / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    job = add(idle, "train", {"folder": str(named / "photos"), **SHORT}).json()
    assert job["settings"]["folder"] == str((named / "photos").resolve())
    idle.client.post(f"/api/jobs/{job['id']}/cancel")
    for path in (named / "photos").iterdir():
        path.unlink()
    (named / "photos").rmdir()


# ---------------------------------------------------------------- forms


def test_forms_are_made_of_the_recipe(idle: Service) -> None:
    schema = idle.client.get("/api/schemas/train").json()
    assert set(schema["properties"]) == {*settings(), "fresh"} - {"output"}
    for name, setting in settings().items():
        if name not in ("output", "folder"):
            assert schema["properties"][name]["description"] == setting.help
    assert schema["properties"]["rank"] == {"type": "integer", "minimum": 1, "maximum": 1024, "default": 8,
                                            "description": settings()["rank"].help}  # fmt: skip
    document = idle.client.get("/api/openapi.json").json()
    assert document["components"]["schemas"]["TrainSettings"] == schema
    kinds = [one["properties"]["kind"]["const"] for one in document["components"]["schemas"]["NewJob"]["oneOf"]]
    assert kinds == [one["kind"] for one in idle.client.get("/api/schemas").json()["data"]] == list(table("jobs"))
    assert idle.client.get("/api/schemas/nothing").status_code == 404
    for kind in table("jobs"):
        assert not LEFT_OUT - {"output"} & set(job_schema(kind)["properties"]), kind
        assert set(job_schema(kind)["required"]) <= set(kind_of(kind).schema()["properties"])


def test_a_recipe_is_resolved_without_a_job(idle: Service, dataset: str) -> None:
    answer = idle.client.post("/api/recipe", json={"settings": {"folder": dataset, "class": "cat", "steps": 5}}).json()
    assert answer["recipe"]["preset"] == "pocket-subject" and answer["recipe"]["steps"] == 5
    assert any("--warmup" in one for one in answer["remarks"])
    assert refusal(idle.client.post("/api/recipe", json={"settings": {"folder": dataset, "steps": "many"}}))[2] == "steps"


def test_presets(idle: Service) -> None:
    rows = {one["name"]: one for one in idle.client.get("/api/presets").json()["data"]}
    assert rows["pocket-subject"]["about"][0] and "rank" in rows["pocket-subject"]["settings"]


# ---------------------------------------------------------------- a job that is running


@pytest.fixture(scope="module")
def done(busy: Service, trained: Any) -> Any:
    """The training of the session, as our own routes tell it."""
    return busy.client.get(f"/api/jobs/{job_id(trained.id)}").json()


def follow(service: Service, job: str, headers: dict[str, str] | None = None) -> tuple[Any, list[tuple[str, str, Any]]]:
    """A job when it is over, and its events as a browser gets them: kind, id, record."""
    events, current = [], dict[str, str]()
    with service.client.stream(
        "GET", f"/api/jobs/{job}/events", headers={"Accept": "text/event-stream", **(headers or {})}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                current[key] = value
            elif "data" in current:
                events.append((current["event"], current.get("id", ""), json.loads(current["data"])))
                current = {}
    return service.client.get(f"/api/jobs/{job}").json(), events


def test_events_come_as_they_happen_and_again(busy: Service, done: Any) -> None:
    assert done["state"] == "succeeded", done["error"]
    _, events = follow(busy, done["id"])
    assert [id for _, id, _ in events[:-1]] == [str(n) for n in range(1, len(events))]
    assert events[-1][0] == "end" and events[-1][2]["state"] == "succeeded"
    assert [record["step"] for kind, _, record in events if kind == "step"] == [1, 2, 3]
    _, rest = follow(busy, done["id"], {"Last-Event-ID": events[4][1]})
    assert rest == events[5:]
    told = busy.client.get(f"/api/jobs/{done['id']}/events", params={"after": 2, "limit": 3}).json()["data"]
    assert [one["number"] for one in told] == [3, 4, 5] and told[0]["event"] == events[2][0]


def test_a_captioner_writes_captions_that_are_read_and_written(busy: Service) -> None:
    images = {f"{number}.png": render_bytes(number) for number in range(2)}
    sent = busy.client.post("/api/datasets", files={"files": ("zwx.zip", zipped(images))}).json()["id"]
    body = {"folder": sent, "model": "pocket", "prefix": "[trigger]", "max_words": 3}
    job = add(busy, "caption", body).json()
    ended, told = follow(busy, job["id"])
    assert ended["state"] == "succeeded" and ended["result"]["written"] == 2
    assert [record["picture"] for kind, _, record in told if kind == "caption"] == ["0.png", "1.png"]
    captions = busy.client.get(f"/api/datasets/{sent}/captions").json()["captions"]
    assert set(captions.values()) == {"[trigger], a red cat"}
    changed = busy.client.put(f"/api/datasets/{sent}/captions", json={"captions": {"0.png": "by hand"}})
    assert changed.json() == {"changed": 1}
    again, _ = follow(busy, add(busy, "caption", body).json()["id"])
    assert again["result"]["written"] == 0 and again["result"]["kept"] == 2
    schema = busy.client.get("/api/openapi.json").json()["components"]["schemas"]["CaptionSettings"]["properties"]
    assert "dry_run" not in schema and schema["threshold"] == {
        "type": "number", "minimum": 0, "maximum": 1, "description": "how likely a tag must be, or a phrase of pocket's",
    }  # fmt: skip


def render_bytes(seed: int) -> bytes:
    render(Scene("cat", "red", "large", "middle", "beach", "ink", seed), 96).save(out := io.BytesIO(), format="PNG")
    return out.getvalue()


def test_changes_of_any_job_are_told(busy: Service) -> None:
    with busy.client.stream("GET", "/api/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: change"
        job = add(busy, "dataset", {"folder": upload(busy, "told"), "quick": True}).json()
        assert any(line == "event: change" for line in lines)
    ended, _ = follow(busy, job["id"])
    assert ended["state"] == "succeeded" and ended["result"]["findings"] is not None


def test_files_of_a_job(busy: Service, done: Any) -> None:
    adapter = busy.client.get(done["files"]["adapter"])
    assert adapter.status_code == 200 and b"lora_unet" in adapter.content
    report = busy.client.get(done["files"]["report"])
    assert report.text.startswith("<!doctype html>".upper()) or "<html" in report.text
    assert "sandbox" in report.headers["content-security-policy"] and "script" not in report.headers["content-security-policy"]
    samples = busy.client.get(f"/api/jobs/{done['id']}/samples").json()["data"]
    assert {one["strength"] for one in samples} >= {0.0, 1.0}
    assert busy.client.get(samples[0]["url"]).content.startswith(b"\x89PNG")
    steps = [one["step_number"] for one in busy.client.get(f"/api/jobs/{done['id']}/checkpoints").json()["data"]]
    assert steps == [3, 2]
    for name in ("../../jobs.sqlite", "state.pt", ".lock", "nothing.png", "samples", ""):
        assert busy.client.get(f"/api/jobs/{done['id']}/files/{name}").status_code == 404, name
    assert isinstance(busy.client.get(f"/api/jobs/{done['id']}/log").text, str)


def test_sample_pictures(idle: Service) -> None:
    found = idle.client.get("/api/samples").json()["data"]
    assert {one["name"] for one in found} == {"subject", "style"}
    made = idle.client.post("/api/samples/subject")
    assert made.status_code == 201 and made.json()["pictures"] > 3 and made.json()["settings"] == found[0]["settings"]
    assert idle.client.post("/api/samples/subject").json()["id"] == made.json()["id"], "they are there once"
    assert refusal(idle.client.post("/api/samples/nothing"))[:2] == (404, "not_found")


def test_the_library(busy: Service, done: Any, tmp_path: Path) -> None:
    rows = busy.client.get("/api/adapters").json()["data"]
    (own,) = [one for one in rows if one["path"] == done["result"]["adapter"]]
    assert own["kind"] == "LoRA" and own["trigger"] == "zwx" and own["made_by"] == "training" and own["ranks"] == [2]
    assert len(busy.client.get("/api/adapters", params={"checkpoints": True}).json()["data"]) > len(rows)
    details = busy.client.get(f"/api/adapters/{own['id']}").json()
    assert details["header"]["family"] == own["family"]
    assert busy.client.get(f"/api/adapters/{own['id']}/preview").headers["content-type"] == "image/png"
    data = busy.client.get(f"/api/adapters/{own['id']}/file").content
    merged = add(busy, "merge", {"files": [f"{own['id']}:0.5", f"{own['id']}:0.25"], "output": "blend"}).json()
    examined = add(busy, "doctor", {"files": [own["id"]]}).json()
    blend, _ = follow(busy, merged["id"])
    assert blend["state"] == "succeeded" and blend["result"]["written"].endswith("adapters/blend.safetensors"), blend["error"]
    assert refusal(add(busy, "merge", {"files": [own["id"]], "output": "blend"}))[:2] == (409, "exists")
    health = follow(busy, examined["id"])[0]
    assert health["result"]["files"] and busy.client.get(health["files"]["picture"]).headers["content-type"] == "image/png"
    again = busy.client.post("/api/adapters", files={"file": ("sent.safetensors", data)})
    assert again.status_code == 201 and again.json()["trigger"] == "zwx"
    assert refusal(busy.client.post("/api/adapters", files={"file": ("sent.safetensors", data)}))[:2] == (409, "exists")
    for name, bad in [("x.pt", data), ("x.ckpt", b"\x80"), ("x.safetensors", b"\x80pickle"), ("../x.safetensors", data),
                      ("x.safetensors", data[:100]), ("x.bin", data), ("NUL.safetensors", data),
                      ("x.safetensors", png())]:  # fmt: skip
        assert busy.client.post("/api/adapters", files={"file": (name, bad)}).status_code == 400, name
    assert refusal(busy.client.post(f"/api/adapters/{own['id']}/send", json={"folder": str(tmp_path)}))[:2] == (403, "outside")
    target = busy.root / "webui"
    target.mkdir()
    sent = busy.client.post(f"/api/adapters/{own['id']}/send", json={"folder": str(target)}).json()["files"]
    assert (target / Path(own["path"]).name).read_bytes() == data and len(sent) >= 2
    assert refusal(busy.client.post(f"/api/adapters/{own['id']}/send", json={"folder": str(target)}))[:2] == (409, "exists")
    assert busy.client.delete(f"/api/adapters/{again.json()['id']}").json()["deleted"]


def test_pictures_are_drawn_with_progress(busy: Service, done: Any) -> None:
    adapter = next(one for one in busy.client.get("/api/adapters").json()["data"] if one["path"] == done["result"]["adapter"])
    given = {
        "prompts": ["zwx cat", f"a <lora:{adapter['name']}:0.5> cat"],
        "stack": [f"{adapter['id']}:0.8"],
        "steps": 2,
        "size": "64",
    }
    job = add(busy, "generate", given).json()
    drawn, events = follow(busy, job["id"])
    assert drawn["state"] == "succeeded", drawn["error"]
    assert len(drawn["files"]["pictures"]) == 2 and busy.client.get(drawn["files"]["pictures"][0]).content.startswith(b"\x89PNG")
    assert [kind for kind, _, _ in events].count("picture") == 2 and drawn["progress"]["done"] == drawn["progress"]["total"] > 0
    failed = add(busy, "generate", {"prompts": ["a <lora:nobody:1> cat"]}).json()
    lost, _ = follow(busy, failed["id"])
    assert lost["state"] == "failed" and "nobody" in lost["error"]["message"]


def test_streams_end_with_the_service(tmp_path: Path) -> None:
    from servers import serving

    from personalize.service.options import Options

    with serving(Options(tmp_path / "w")) as service:
        stream: Iterator[str] = iter(())
        with service.client.stream("GET", "/api/events") as answer:
            stream = answer.iter_lines()
            assert next(stream) == "event: change"
            begun = time.monotonic()
            service.studio.live.close()
            list(stream)
            assert time.monotonic() - begun < 10
