"""One writer at a time: a file `.lock` in a folder, locked by the operating system for as long as its holder lives.

The lock is the process's, and not the file: that of a process that died is free, whatever the file says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .errors import OutputError
from .io import disk_error

LOCK = ".lock"
BEHIND = 1 << 20  # Windows keeps others from reading the bytes that are locked: it is one far behind the text
PAUSE = 0.1  # seconds between two looks at a lock that is waited for
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a disk says that knows none


@contextlib.contextmanager
def hold(folder: Path, hint: str) -> Iterator[None]:
    """Inside, nobody else holds this folder, in this process or in another. A missing folder is made.

    Raises OutputError, which names the holder and gives the `hint`, where somebody does. A disk without locks is done without.
    """
    handle = _lock(folder / LOCK)
    if handle is None:
        raise OutputError(f"{folder} is in use: {holder_of(folder)}", hint)
    with _tell_holder(folder / LOCK, handle):
        yield


@contextlib.contextmanager
def wait_for(path: Path, seconds: float) -> Iterator[str]:
    """Inside, nobody else holds a lock file; yields who did until then, in words, or "" where nobody had it.

    Who holds it for longer than so many seconds is passed by, for work that two may do without harm. So is a disk that refuses.
    """
    end, holder = time.monotonic() + seconds, ""
    try:
        while (handle := _lock(path)) is None and time.monotonic() < end:
            holder = _who(path)
            time.sleep(PAUSE)
    except OutputError:
        handle = None
    with contextlib.nullcontext() if handle is None else _tell_holder(path, handle):
        yield holder


@contextlib.contextmanager
def _tell_holder(path: Path, handle: int) -> Iterator[None]:
    """Inside, a locked file says who holds it; behind it, it is gone."""
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps(about).encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether somebody holds a folder."""
    if not (folder / LOCK).is_file():
        return False
    handle = _lock(folder / LOCK, shared=True)
    if handle is not None:
        os.close(handle)
    return handle is None


def holder_of(folder: Path) -> str:
    """Who wrote into a folder's lock file, in words."""
    return _who(folder / LOCK)


def holder_process(folder: Path) -> int | None:
    """The process of this machine that wrote into a folder's lock file; None for another machine's, and where it says nothing."""
    try:
        about = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return int(about["pid"]) if about["host"] == socket.gethostname() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _who(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"by process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written
        return "by another process"


def _lock(path: Path, shared: bool = False) -> int | None:
    """A handle of a file that is locked now; None if it is somebody else's. Raises OutputError where it cannot be made.

    Who only looks takes a `shared` lock, which keeps out nobody who looks, and no holder for longer than the look takes.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock_handle(handle, shared):
                is_looked_at = not shared and _lock_handle(handle, shared=True)
                os.close(handle)
                if is_looked_at:
                    continue
                return None
            if os.fstat(handle).st_nlink:  # 0: the last holder has removed it meanwhile
                return handle
            os.close(handle)
    except OSError as error:
        raise disk_error(path, error, "another --output") from error


def _lock_handle(handle: int, shared: bool) -> bool:
    """Lock an open file, until it is closed; False if somebody else has."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(handle)  # where no lock is shared
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def _lock_on_windows(handle: int) -> bool:
    import msvcrt

    os.lseek(handle, BEHIND, os.SEEK_SET)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True
