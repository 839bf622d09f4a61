"""Writing files so that a crash, a full disk or a power cut never leaves half of one behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: what the block writes there replaces `path` at its end, or vanishes if it fails.

    Missing folders above `path` are made. Raises OutputError for anything the disk refuses.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=f"{path.suffix}.tmp")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(f"cannot write {path}: {reason}", "free some space" if full else "choose another place") from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def disk_error(path: Path, error: OSError, place: str = "another place") -> OutputError:
    """The OutputError for what the disk refused; `place` is what to choose instead of `path`."""
    return OutputError(f"cannot write {path}: {error.strerror or error}", f"free some space or choose {place}")


def write_text(path: Path, text: str) -> Path:
    """Write a small text file whole or not at all; bytes of a name that are no UTF-8 become escapes, which JSON reads."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _umask() -> int:
    """The process's file mode mask; Python can only read it by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def weights_hash(path: Path) -> str:
    """sha256 of all bytes behind a safetensors header (kohya's `sshs_model_hash`)."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """sha256 of what is left of an open file."""
    return digest_of(file, "sha256")


def digest_of(file: BinaryIO, algorithm: str) -> str:
    """A hash of what is left of an open file, in hex: hashlib.file_digest, which Python 3.10 has not."""
    digest, block = hashlib.new(algorithm, usedforsecurity=False), memoryview(bytearray(1 << 18))
    while count := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:count])
    return digest.hexdigest()
