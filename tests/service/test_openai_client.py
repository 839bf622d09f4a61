"""The `openai` client from PyPI, as it is, trains and draws through the service."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from servers import SHORT, Service, ended, pictures, png, wait, zipped


def test_files(client: openai.OpenAI, archive: Any) -> None:
    assert archive.object == "file" and archive.purpose == "fine-tune" and archive.filename == "rex.zip"
    assert archive.id in [one.id for one in client.files.list(purpose="fine-tune")]
    assert client.files.retrieve(archive.id).bytes == archive.bytes == len(client.files.content(archive.id).read())


def test_a_training(client: openai.OpenAI, trained: Any) -> None:
    assert trained.fine_tuned_model.startswith("ft:pocket:personalize:rex:")
    assert trained.finished_at >= trained.created_at and trained.estimated_finish is None
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "red"})] == [trained.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "blue"})) == []
    adapter = client.files.content(trained.result_files[0]).read()
    assert b"lora_unet" in adapter and client.files.retrieve(trained.result_files[0]).purpose == "fine-tune-results"


def test_events_page_by_page(client: openai.OpenAI, trained: Any) -> None:
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=4))  # the client asks for the next pages
    assert len({event.id for event in events}) == len(events) > 8
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    times = [event.created_at for event in events]
    assert times == sorted(times, reverse=True) and trained.created_at <= times[-1] <= times[0] <= trained.finished_at + 1
    assert events[0].message == "The job is succeeded" and events[-1].message == "The job is queued"


def test_checkpoints(client: openai.OpenAI, trained: Any) -> None:
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id))
    assert [one.step_number for one in checkpoints] == [3, 2]
    for one in checkpoints:
        assert one.fine_tuning_job_id == trained.id and one.metrics.train_loss is not None
        assert client.models.retrieve(one.fine_tuned_model_checkpoint).id == one.fine_tuned_model_checkpoint


def test_models(client: openai.OpenAI, trained: Any) -> None:
    models = [one.id for one in client.models.list()]
    assert models[0] == "pocket" and trained.fine_tuned_model in models
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("ft:pocket:personalize:rex:00000000")
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete("pocket")


def picture(one: Any) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(one.b64_json)))
    image.load()
    return image


def test_draw_with_what_was_trained(client: openai.OpenAI, busy: Service, trained: Any) -> None:
    asked: dict[str, Any] = {"prompt": "zwx cat", "size": "64x64", "n": 2, "extra_body": {"seed": 3, "steps": 2}}
    answer = client.images.generate(model=trained.fine_tuned_model, **asked)
    assert answer.data and len(answer.data) == 2
    first, second = map(picture, answer.data)
    assert first.size == (64, 64) and first.tobytes() != second.tobytes()
    assert busy.client.get(str(answer.data[0].url)).content == base64.b64decode(answer.data[0].b64_json or "")
    plain = client.images.generate(model="pocket", **asked, response_format="b64_json")
    assert plain.data and plain.data[0].url is None and picture(plain.data[0]).tobytes() != first.tobytes()
    assert "Seed: 3" in first.info["parameters"] and "rex" in first.info["parameters"]  # type: ignore[operator]


def test_edit_a_picture(client: openai.OpenAI, busy: Service) -> None:
    answer = client.images.edit(
        image=("begin.png", png(64)), prompt="a cat", model="pocket", size="64x64", extra_body={"steps": 2, "denoise": 0.5},
        output_format="webp",
    )  # fmt: skip
    assert answer.data and picture(answer.data[0]).format == "WEBP"
    assert not [one for one in client.files.list() if one.purpose == "vision"]  # what was begun with is not kept


def test_edit_what_a_mask_leaves_open(client: openai.OpenAI, busy: Service) -> None:
    begun, hole = png(64), io.BytesIO()
    with Image.open(io.BytesIO(begun)) as opened:
        before = opened.convert("RGBA")
    before.paste((0, 0, 0, 0), (0, 0, 32, 64))
    before.save(hole, "png")
    asked = {"prompt": "a cat", "model": "pocket", "size": "64x64", "extra_body": {"steps": 2}}
    answer = client.images.edit(image=("begin.png", begun), mask=("mask.png", hole.getvalue()), **asked)
    assert answer.data
    after, kept = picture(answer.data[0]).convert("RGB"), before.convert("RGB")
    assert after.crop((32, 0, 64, 64)).tobytes() == kept.crop((32, 0, 64, 64)).tobytes()
    assert after.crop((0, 0, 30, 64)).tobytes() != Image.open(io.BytesIO(begun)).convert("RGB").crop((0, 0, 30, 64)).tobytes()
    assert not [one for one in client.files.list() if one.purpose == "vision"]
    for mask in (png(32), b"no picture"):
        with pytest.raises(openai.BadRequestError, match="mask"):
            client.images.edit(image=("a.png", begun), mask=("mask.png", mask), **asked)
    assert not [one for one in client.files.list() if one.purpose == "vision"]


def test_streams_of_pictures(client: openai.OpenAI) -> None:
    events = list(client.images.generate(model="pocket", prompt="a cat", size="64x64", stream=True, extra_body={"steps": 1}))
    assert [event.type for event in events] == ["image_generation.completed"]
    assert picture(events[0]).size == (64, 64)


def test_errors_have_the_clients_shape(client: openai.OpenAI, archive: Any) -> None:
    create = client.fine_tuning.jobs.create
    with pytest.raises(openai.BadRequestError, match="did you mean rank") as found:
        create(model="pocket", training_file=archive.id, extra_body={"rnak": 2})
    assert found.value.param == "rnak" and found.value.code == "recipe_error" and found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="1 to 1024") as found:
        create(model="pocket", training_file=archive.id, extra_body={"rank": 0})
    assert found.value.param == "rank"
    with pytest.raises(openai.BadRequestError, match="dpo"):
        create(model="pocket", training_file=archive.id, method={"type": "dpo"})
    with pytest.raises(openai.NotFoundError, match="no file"):
        create(model="pocket", training_file="file-0000000000000000")
    with pytest.raises(openai.APIStatusError, match="no base called"):
        create(model="pokcet", training_file=archive.id, extra_body={"class": "cat"})
    with pytest.raises(openai.BadRequestError, match="zip"):
        client.files.create(file=("train.jsonl", b'{"messages": []}'), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="sampler"):
        client.images.generate(prompt="a cat", extra_body={"sampler": "eulr"})


def test_epochs_and_rates(client: openai.OpenAI, archive: Any) -> None:
    numbers: Any = {"n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 0.5}
    waits: Any = {**SHORT, "steps": None, "class": "cat"}
    blocker = client.fine_tuning.jobs.create(model="pocket", training_file=archive.id, extra_body={**SHORT, "steps": 5000})
    try:
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
        for how in ({"hyperparameters": numbers}, {"method": method}):  # of older clients, of newer ones
            job = client.fine_tuning.jobs.create(model="pocket", training_file=archive.id, extra_body=waits, **how)
            settings = job.settings  # type: ignore[attr-defined]
            assert (settings["steps"], settings["batch_size"]) == (15, 2)  # three pictures, ten times
            assert settings["lr"] == pytest.approx(client_rate(client, archive) / 2)
            assert job.hyperparameters.n_epochs == 10
            assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    finally:
        client.fine_tuning.jobs.cancel(blocker.id)
        assert ended(client, blocker.id).status == "cancelled"


def client_rate(client: openai.OpenAI, archive: Any) -> float:
    """The preset's learning rate."""
    recipe: Any = client.post("/../api/recipe", body={"settings": {"folder": archive.id, "class": "cat"}}, cast_to=object)
    return float(recipe["recipe"]["lr"])


def test_pause_resume_and_cancel(client: openai.OpenAI, archive: Any) -> None:
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="pocket", training_file=archive.id, extra_body={**SHORT, "steps": 5000, "checkpoint_every": 0})
    wait(lambda: jobs.retrieve(job.id), lambda one: one.status == "running" and one.progress.get("done", 0) >= 2)
    assert jobs.retrieve(job.id).estimated_finish is not None
    jobs.pause(job.id)
    paused: Any = wait(lambda: jobs.retrieve(job.id), lambda one: one.paused)
    assert paused.status == "queued" and paused.progress["done"] >= 2
    assert jobs.resume(job.id).status in ("queued", "running")
    wait(lambda: jobs.retrieve(job.id), lambda one: one.status == "running" and one.progress["done"] > paused.progress["done"])
    jobs.cancel(job.id)
    assert ended(client, job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="cancelled"):
        jobs.pause(job.id)


def test_go_on_from_a_model(client: openai.OpenAI, archive: Any, trained: Any) -> None:
    job: Any = client.fine_tuning.jobs.create(
        model=trained.fine_tuned_model, training_file=archive.id, suffix="more", extra_body={**SHORT, "steps": 1}
    )
    assert job.settings["init"].endswith(".safetensors") and job.settings["base"] == "pocket"
    client.fine_tuning.jobs.cancel(job.id)
    assert ended(client, job.id).status in ("cancelled", "succeeded")


def test_large_files_in_parts(client: openai.OpenAI, tmp_path: Path) -> None:
    (path := tmp_path / "parts.zip").write_bytes(zipped(pictures(2)))
    done = client.uploads.upload_file_chunked(file=path, mime_type="application/zip", purpose="fine-tune", part_size=700)
    assert done.status == "completed" and done.file and client.files.content(done.file.id).read() == path.read_bytes()
    upload = client.uploads.create(bytes=10, filename="a.zip", mime_type="application/zip", purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="more than"):
        client.uploads.parts.create(upload.id, data=b"x" * 11)
    assert client.uploads.cancel(upload.id).status == "cancelled"


def test_deleted_files_and_models_are_gone(client: openai.OpenAI, busy: Service) -> None:
    sent = client.files.create(file=("gone.zip", zipped(pictures(1))), purpose="fine-tune")
    folder = busy.studio.datasets.folder(sent.dataset)  # type: ignore[attr-defined]
    assert folder.is_dir() and client.files.delete(sent.id).deleted and not folder.exists()
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)


def test_the_session_in_the_docs(
    busy: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[2]
    code = (root / "docs" / "service.md").read_text().partition("<!-- session -->\n```python\n")[2].partition("```")[0]
    asked = '"class": "cat", "trigger": "zwx", "steps": 60, "checkpoint_every": 30'
    assert asked in code and "127.0.0.1:8765" in code
    code = (
        code.replace("http://127.0.0.1:8765", busy.address)
        .replace(f"{{{asked}}}", repr(SHORT))
        .replace('"seed": 3', '"steps": 1')
    )
    (tmp_path / "sample_data").symlink_to(root / "sample_data")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    try:
        exec(code, values)
    finally:
        values["client"].close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("processed cat") and lines[2].startswith("succeeded ft:pocket:personalize:scarf:")
    assert (tmp_path / "scarf.safetensors").stat().st_size > 1000 and "'pocket'" in lines[-1]
