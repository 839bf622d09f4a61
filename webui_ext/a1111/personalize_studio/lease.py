"""Who needs the service: a locked file for each, which the operating system lets go of when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".lease"
PAUSE = 0.1  # seconds between two looks at a lock that is waited for


class Lease:
    """A file that is locked for as long as this process lives, or until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take one. Raises OSError where the folder cannot be written to."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}{SUFFIX}"
        self.handle: int | None = lock(self.path)

    def release(self) -> None:
        """Give it back."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None
            with contextlib.suppress(OSError):
                self.path.unlink()


def is_needed(folder: Path) -> bool:
    """Whether anybody holds a lease; files that dead processes left are removed."""
    held = False
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            handle = lock(path, create=False)
        except OSError:  # removed meanwhile
            continue
        if handle is None:
            held = True
            continue
        os.close(handle)
        with contextlib.suppress(OSError):
            path.unlink()
    return held


@contextlib.contextmanager
def alone(path: Path, seconds: float) -> Iterator[bool]:
    """Inside, no other process is inside with the same file; False where another one stays longer than so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    while (handle := lock(path)) is None and time.monotonic() < end:
        time.sleep(PAUSE)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def lock(path: Path, create: bool = True) -> int | None:
    """A handle of a file that is locked now, until it is closed; None if somebody else has it. Raises OSError."""
    handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        _lock_handle(handle)
    except OSError:
        os.close(handle)
        return None
    return handle


def _lock_handle(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
