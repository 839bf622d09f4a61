"""What strangers send: it is used, left out with a reason, or refused with one; nothing is written elsewhere."""

from __future__ import annotations

import gc
import io
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from servers import SMALL, Service, pictures, png, zipped

Upload = Callable[[str, bytes], httpx.Response]


def below(root: Path) -> set[Path]:
    """Everything around a workspace, so that what lands outside of it is seen; without the store's own files."""
    return {path for path in root.parent.rglob("*") if not path.name.startswith("jobs.sqlite")}


@pytest.fixture(params=["dataset", "more files", "training file", "upload in parts"])
def upload(request: pytest.FixtureRequest, idle: Service) -> Iterator[Upload]:
    """Each door for archives; behind the test nothing may be there that was not there before."""
    client, dataset = idle.client, ""
    if request.param == "more files":
        dataset = new_dataset(idle)
    before = below(idle.root)

    def send(name: str, data: bytes) -> httpx.Response:
        if request.param == "dataset":
            return client.post("/api/datasets", files={"files": (name, data)})
        if request.param == "more files":
            return client.post(f"/api/datasets/{dataset}/files", files={"files": (name, data)})
        if request.param == "training file":
            return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"})
        body = {"filename": name, "bytes": len(data), "purpose": "fine-tune"}
        if (begun := client.post("/v1/uploads", json=body)).status_code != 200:
            return begun
        id = begun.json()["id"]
        part = client.post(f"/v1/uploads/{id}/parts", files={"data": ("data", data)}).json()["id"]
        answer = client.post(f"/v1/uploads/{id}/complete", json={"part_ids": [part]})
        client.post(f"/v1/uploads/{id}/cancel")
        return answer

    yield send
    assert below(idle.root) == before
    if dataset:
        client.delete(f"/api/datasets/{dataset}")


def new_dataset(service: Service, files: dict[str, Any] | None = None) -> str:
    sent = [("files", (name, data)) for name, data in (files or pictures(2)).items()]
    answer = service.client.post("/api/datasets", files=sent, data={"name": "given"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def check_refused(answer: httpx.Response, *codes: str) -> None:
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500 and error["code"] in codes and error["message"], answer.text
    assert "Traceback" not in answer.text and "incoming" not in answer.text


BAD_NAMES = ["../up.png", "a/../../up.png", "/etc/up.png", "C:/up.png", "C:up.png", "..\\up.png", "a\\b.png", "NUL.png",
             "con.txt", "aux.tar.png", "a/COM1.png", ".hidden/../../x.png", "a\u202egnp.png", "a\x07.png", "x. /a.png",
             "a?.png", "a:b.png", "/".join("abcdefgh") + "/deep.png", "x" * 300 + ".png"]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_in_archives_that_lead_elsewhere(upload: Upload, name: str) -> None:
    check_refused(upload("a.zip", zipped({"good.png": png(), name: png()})), "bad_path", "bad_name", "bad_archive")


def test_a_nul_in_a_name(upload: Upload) -> None:
    data = zipped({"good.png": png(), "aXpng": png()}).replace(b"aXpng", b"a\0png")
    check_refused(upload("a.zip", data), "bad_archive", "bad_name")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices(upload: Upload, kind: int) -> None:
    def change(info: zipfile.ZipInfo) -> None:
        if info.filename == "link.png":
            info.create_system, info.external_attr = 3, (kind | 0o777) << 16

    check_refused(upload("a.zip", zipped({"good.png": png(), "link.png": "/etc/passwd"}, change)), "bad_archive")


def test_what_grows_too_much(upload: Upload) -> None:
    bomb = zipped({"good.png": png(), "bomb.png": b"\0" * 3_000_000})
    assert len(bomb) < 20_000
    check_refused(upload("a.zip", bomb), "bad_archive")
    check_refused(upload("a.zip", zipped({f"{n}.txt": b"\0" * 900_000 for n in range(6)})), "too_large")


def test_entries_that_share_their_bytes(upload: Upload) -> None:
    """As in Fifield's bomb: the second entry's place is the first one's."""
    data = bytearray(zipped({"a.png": png(), "b.png": png()}))
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    check_refused(upload("a.zip", bytes(data)), "bad_archive")


def test_sizes_that_are_not_true(upload: Upload) -> None:
    """The directory says 10 bytes, and so many are read: the checksum is not theirs."""
    data = bytearray(zipped({"a.png": png(100)}))
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<L", 10)
    check_refused(upload("a.zip", bytes(data)), "bad_archive")


def test_too_many_files(upload: Upload) -> None:
    check_refused(upload("a.zip", zipped({f"{n}.txt": "x" for n in range(SMALL.files + 1)})), "too_many_files")


def test_a_directory_that_would_not_fit_into_memory(upload: Upload) -> None:
    data = bytearray(zipped(pictures(1)))
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = struct.pack("<L", 0xFFFFFFFF)
    check_refused(upload("a.zip", bytes(data)), "too_many_files")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_to_pack(upload: Upload, method: int) -> None:
    def change(info: zipfile.ZipInfo) -> None:
        info.compress_type = method

    check_refused(upload("a.zip", zipped({"a.png": png()}, change)), "bad_archive")


def test_what_is_encrypted(upload: Upload) -> None:
    data = bytearray(zipped({"a.png": png()}))
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1
    check_refused(upload("a.zip", bytes(data)), "bad_archive")


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"no archive", b"PK\x05\x06" + b"\0" * 18, png(), b"\x80\x04pickle", zipped(pictures(1))[:-30]]
)
def test_what_is_no_archive(upload: Upload, data: bytes) -> None:
    check_refused(upload("a.zip", data), "bad_archive", "nothing_to_use", "no_pictures", "invalid_value")


def test_damaged_archives(upload: Upload) -> None:
    """Every byte of a small archive is another one, one at a time: it is refused, or what it holds is whole."""
    data = zipped({"a.png": "no picture"})
    for at in range(0, len(data), 9):
        spoiled = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        assert 400 <= upload("a.zip", spoiled).status_code < 500  # no picture is in it in any case


def test_names_twice(upload: Upload) -> None:
    check_refused(upload("a.zip", zipped({"a.png": png(), "A.PNG": png()})), "bad_archive")
    check_refused(upload("a.zip", zipped({"\u00e9.png": png(), "e\u0301.png": png()})), "bad_archive")


def test_pictures_alone_that_are_none(upload: Upload) -> None:
    for name, data in [("a.png", b"no picture"), ("a.png", b""), ("a.svg", b"<svg onload='x'/>"), ("a.sh", b"#!/bin/sh"),
                       ("a", png()), ("a.safetensors", b"x"), ("a.png", b"GIF89a"),
                       ("a.zip.exe", zipped(pictures(1)))]:  # fmt: skip
        check_refused(upload(name, data), "nothing_to_use", "no_archive", "bad_name", "no_pictures", "invalid_value")


def huge(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(2000, 2000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_huge_pictures(idle: Service, size: tuple[int, int]) -> None:
    before = below(idle.root)
    answer = idle.client.post("/api/datasets", files={"files": ("a.png", huge(*size))})
    check_refused(answer, "nothing_to_use")
    assert "pixels" in answer.text or "damaged" in answer.text
    assert below(idle.root) == before


def test_too_large_bodies(idle: Service) -> None:
    before = below(idle.root)
    data = b"x" * (SMALL.upload + 1)
    for answer in [
        idle.client.post("/api/datasets", files={"files": ("a.png", data)}),
        idle.client.post("/v1/files", files={"file": ("a.zip", data)}, data={"purpose": "fine-tune"}),
        idle.client.post("/api/adapters", files={"file": ("a.safetensors", data)}),
        idle.client.post(
            "/api/jobs", content=b'{"settings": "' + b"x" * SMALL.body + b'"}', headers={"Content-Type": "application/json"}
        ),
        idle.client.post("/api/jobs", content=(b"x" * 10_000 for _ in range(50)), headers={"Content-Type": "application/json"}),
        idle.client.post("/v1/uploads", json={"filename": "a.zip", "bytes": 10**12, "purpose": "fine-tune"}),
    ]:
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large", answer.text
    assert below(idle.root) == before


TORN = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc'


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Starlette leaves the file of a torn form open
def test_multipart_that_is_none(idle: Service) -> None:
    for content, kind in [(b"--x\r\n", "multipart/form-data; boundary=x"), (b"garbage", "multipart/form-data"),
                          (TORN, "multipart/form-data; boundary=x"), (b"{}", "application/json"), (b"", "")]:  # fmt: skip
        for path in ("/api/datasets", "/v1/files", "/api/adapters", "/v1/images/edits"):
            answer = idle.client.post(path, content=content, headers={"Content-Type": kind})
            assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], (path, content, answer.text)
    gc.collect()


# ---------------------------------------------------------------- what is good


def test_a_folder_of_pictures_singly(idle: Service) -> None:
    sent = [("files", (f"photos/{name}", data)) for name, data in pictures(2).items()]
    sent += [("files", ("photos/broken.png", b"no")), ("files", ("photos/notes.docx", b"x"))]
    answer = idle.client.post("/api/datasets", files=sent, data={"name": "My Rex"})
    assert answer.status_code == 201, answer.text
    record = answer.json()
    assert record["id"] == "my-rex" and record["own"]
    assert {one["name"] for one in record["left_out"]} == {"broken.png", "notes.docx"}
    idle.client.delete(f"/api/datasets/{record['id']}")


def test_an_archive_as_people_make_them(idle: Service) -> None:
    """One folder around all, a Mac's leavings, names in any script, masks as fal calls them, a picture that is broken."""
    mask = io.BytesIO()
    Image.new("L", (32, 32), 255).save(mask, format="JPEG")
    files: dict[str, bytes | str] = {
        "rex/1.png": png(), "rex/1.txt": "zwx cat", "rex/1_mask.jpg": mask.getvalue(), "__MACOSX/rex/._1.png": b"x",
        "rex/.DS_Store": b"x", "rex/\u732b.png": png(40), "rex/readme.md": "hello", "rex/broken.png": b"x", "rex/metadata.jsonl":
        '{"file_name": "\u732b.png", "text": "zwx cat, a drawing"}',
    }  # fmt: skip
    record = idle.client.post("/api/datasets", files={"files": ("archive.zip", zipped(files))}).json()
    assert record["id"] in ("rex", "rex-2") and record["pictures"] == 2  # another test may have made a "rex"
    assert sorted(record["files"]) == ["1-masklabel.png", "1.png", "1.txt", "metadata.jsonl", "\u732b.png"]
    assert {one["name"] for one in record["left_out"]} == {"readme.md", "broken.png"}
    shown = {one["name"]: one for one in idle.client.get(f"/api/datasets/{record['id']}").json()["data"]}
    assert shown["1.png"]["caption"] == "zwx cat" and shown["1.png"]["mask"] == "1-masklabel.png"
    assert shown["\u732b.png"]["caption"] == "zwx cat, a drawing"
    assert idle.client.get(shown["\u732b.png"]["url"]).content == png(40)
    small = idle.client.get("/api/datasets/rex/pictures/1.png", params={"side": 16})
    assert Image.open(io.BytesIO(small.content)).size == (16, 16) and small.headers["content-type"] == "image/webp"
    assert idle.client.delete("/api/datasets/rex").json()["deleted"]


def test_concepts_of_kohyas_stay_apart(idle: Service) -> None:
    data = zipped({"10_zwx cat/1.png": png(), "5_xiv dog/2.png": png(40)})
    record = idle.client.post("/api/datasets", files={"files": ("two.zip", data)}).json()
    checked = idle.client.post(f"/api/datasets/{record['id']}/check", json={}).json()
    assert {(one["trigger"], one["class"]) for one in checked["concepts"]} == {("zwx", "cat"), ("xiv", "dog")}
    one = idle.client.post("/api/datasets", files={"files": ("one.zip", zipped({"10_zwx cat/1.png": png()}))}).json()
    assert one["files"] == ["10_zwx cat/1.png"]
    for id in (record["id"], one["id"]):
        idle.client.delete(f"/api/datasets/{id}")


def test_more_files_replace_only_where_that_is_said(idle: Service) -> None:
    dataset = new_dataset(idle)
    at = f"/api/datasets/{dataset}/files"
    check_refused(idle.client.post(at, files={"files": ("0.PNG", png(50))}), "exists")
    assert idle.client.get(f"/api/datasets/{dataset}/pictures/0.png").content == pictures(1)["0.png"]
    assert idle.client.post(at, files={"files": ("0.PNG", png(50))}, data={"replace": "true"}).status_code == 200
    assert idle.client.get(f"/api/datasets/{dataset}/pictures/0.png").content == png(50)
    assert idle.client.post(at, files={"files": ("more.zip", zipped({"9.png": png(48)}))}).json()["pictures"] == 3
    idle.client.delete(f"/api/datasets/{dataset}")


def test_captions_are_read_and_written_all_or_none(idle: Service) -> None:
    dataset = new_dataset(idle)
    at = f"/api/datasets/{dataset}/captions"
    assert idle.client.get(at).json()["captions"] == {"0.png": "zwx cat, number 0", "1.png": "zwx cat, number 1"}
    check_refused(idle.client.put(at, json={"captions": {"0.png": "new", "nothing.png": "x"}}), "not_found")
    check_refused(idle.client.put(at, json={"captions": {"0.png": "new", "../x.png": "x"}}), "not_found")
    check_refused(idle.client.put(at, json={"captions": {"0.png": "a\0b"}}), "no_text")
    check_refused(idle.client.put(at, json={"captions": {"0.png": "x" * 20_001}}), "invalid_value")
    assert idle.client.get(at).json()["captions"]["0.png"] == "zwx cat, number 0"
    assert idle.client.put(at, json={"captions": {"0.png": " zwx cat \n in snow ", "1.png": "zwx cat, number 1"}}).json() == {
        "changed": 1
    }
    assert (idle.studio.datasets.folder(dataset) / "0.txt").read_text() == "zwx cat in snow\n"
    checked = idle.client.post(f"/api/datasets/{dataset}/check", json={"settings": {"trigger": "xyz"}}).json()
    assert "without-trigger" in [one["code"] for one in checked["findings"]]
    assert idle.client.delete(f"/api/datasets/{dataset}/pictures/0.png").json()["deleted"]
    assert sorted(path.name for path in idle.studio.datasets.folder(dataset).iterdir()) == ["1.png", "1.txt"]
    idle.client.delete(f"/api/datasets/{dataset}")


def test_masks(idle: Service) -> None:
    dataset = new_dataset(idle)
    at = f"/api/datasets/{dataset}/masks/0.png"
    white, black, wide = (io.BytesIO() for _ in range(3))
    Image.new("L", (64, 64), 255).save(white, format="PNG")
    Image.new("L", (64, 64), 0).save(black, format="PNG")
    Image.new("L", (128, 64), 255).save(wide, format="PNG")
    for bad in (b"no", black.getvalue(), wide.getvalue(), huge(9000, 9000)):
        check_refused(idle.client.put(at, files={"file": ("m.png", bad)}), "bad_mask", "data_error")
    assert idle.client.put(at, files={"file": ("m.png", white.getvalue())}).json() == {"mask": "0-masklabel.png"}
    assert idle.client.get(f"/api/datasets/{dataset}").json()["data"][0]["mask"] == "0-masklabel.png"
    idle.client.delete(f"/api/datasets/{dataset}")


@pytest.mark.parametrize(
    "name", ["..%2f..%2ftoken", "%2e%2e/%2e%2e/jobs.sqlite", "....//x.png", "%00.png", "0.txt", "NUL.png", "x" * 5000]
)
def test_names_in_addresses_that_lead_elsewhere(idle: Service, name: str) -> None:
    dataset = new_dataset(idle)
    for method in ("GET", "DELETE"):
        answer = idle.client.request(method, f"/api/datasets/{dataset}/pictures/{name}")
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
    for path in (
        f"/api/datasets/{name}",
        f"/api/jobs/x/files/{name}",
        f"/v1/files/{name}/content",
        f"/static/{name}",
        f"/api/adapters/{name}",
    ):
        answer = idle.client.get(path)
        assert 400 <= answer.status_code < 500, path
    assert len(list(idle.studio.datasets.folder(dataset).iterdir())) == 4
    idle.client.delete(f"/api/datasets/{dataset}")


def test_links_in_a_named_folder_lead_nowhere(idle: Service, tmp_path: Path) -> None:
    named = idle.studio.options.folders[0]
    (tmp_path / "secret.png").write_bytes(png())
    (named / "own.png").write_bytes(png())
    (named / "link.png").symlink_to(tmp_path / "secret.png")
    try:
        assert "folder-1" in [one["id"] for one in idle.client.get("/api/datasets").json()["data"]]
        assert idle.client.get("/api/datasets/folder-1/pictures/own.png").status_code == 200
        assert idle.client.get("/api/datasets/folder-1/pictures/link.png").status_code == 404
        assert idle.client.delete("/api/datasets/folder-1").status_code == 403
    finally:
        for path in named.iterdir():
            path.unlink()


def test_a_named_folder_of_folders_is_a_dataset_for_each(idle: Service) -> None:
    """Somebody who keeps a folder for each subject names the one above them."""
    named = idle.studio.options.folders[0]
    for name in ("rex", "tom", ".hidden", "empty"):
        (named / name).mkdir()
        if name != "empty":
            (named / name / "one.png").write_bytes(png())
    (named / "notes.txt").write_text("about them")
    try:
        listed = {one["id"]: one for one in idle.client.get("/api/datasets").json()["data"] if not one["own"]}
        assert {id: one["pictures"] for id, one in listed.items()} == {"folder-1-rex": 1, "folder-1-tom": 1}
        assert (
            idle.client.put("/api/datasets/folder-1-rex/captions", json={"captions": {"one.png": "a dog"}}).json()["changed"] == 1
        )
        assert (named / "rex" / "one.txt").read_text() == "a dog\n"
        assert idle.client.post("/api/datasets/folder-1-tom/check", json={}).status_code == 200
        assert idle.client.delete("/api/datasets/folder-1-rex").status_code == 403
        assert idle.client.get("/api/datasets/folder-1-nobody").status_code == 404
    finally:
        for path in named.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
