"""What a service is started with, as one value."""

from __future__ import annotations

import ipaddress
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..io import atomic, disk_error

HOST, PORT = "127.0.0.1", 8765
TOKEN = "PERSONALIZE_TOKEN"  # the environment variable that may hold it
SHORTEST = 16  # letters of a token: shorter ones can be guessed
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
ANY = ("0.0.0.0", "::", "")  # addresses of a socket that listens to all networks


@dataclass(frozen=True)
class Limits:
    """What one upload may hold, in bytes, files and pixels."""

    body: int = 1 << 20  # of a request that uploads nothing
    upload: int = 4 << 30  # of one that does
    unpacked: int = 8 << 30  # of an archive, all together
    files: int = 5000  # of a dataset
    pixels: int = 80_000_000  # of a picture; Pillow itself refuses a few more
    text: int = 1 << 20  # of a caption file
    metadata: int = 64 << 20  # of metadata.jsonl
    ratio: int = 200  # so many times may an archive's file grow, where it is large
    days: int = 1  # that an upload in parts may take


@dataclass(frozen=True)
class Options:
    """Where a service works, who may call it, and what it takes."""

    workspace: Path
    host: str = HOST
    port: int = PORT
    token: str = field(default="", repr=False)  # "": everybody who reaches it may use it
    folders: tuple[Path, ...] = ()  # outside of the workspace, that requests may name
    names: tuple[str, ...] = ()  # further host names by which it is called
    hosts: tuple[Path, ...] = ()  # where image UIs keep their adapters: requests may copy some there, and nothing else
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Raise RecipeError for a token that is too short or no plain text, and for a service in a network without one."""
        if self.token and not (len(self.token) >= SHORTEST and self.token.isascii() and self.token.isprintable()):
            raise RecipeError("the token can be guessed or not be sent", f"at least {SHORTEST} letters, ASCII alone")
        if self.in_network and not self.token:
            raise RecipeError(f"a service that listens on {self.host} needs a token", f"set {TOKEN}, or leave --host out")

    @property
    def in_network(self) -> bool:
        """Whether others than programs of this machine may reach it: by its address, or by names that a proxy gives it."""
        return not is_local(self.host) or not all(map(is_local, self.names))


def is_local(name: str) -> bool:
    """Whether a host's name or address is this machine's own, and reached from nowhere else.

    >>> [is_local(name) for name in ("localhost", "127.0.0.2", "::1", "0.0.0.0", "evil.localhost.example", "192.168.1.5")]
    [True, True, True, False, False, False]
    """
    if name.lower() in LOCAL_NAMES:
        return True
    address = address_of(name)
    return bool(address and address.is_loopback)


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host's name spells out; None for a name that has to be looked up."""
    try:
        return ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return None


def find_token(workspace: Path, needed: bool) -> tuple[str, Path | None]:
    """The token of the environment, else the one that lies in the workspace, which is made if one is needed; and its file.

    The file is its owner's alone. Without need, only the environment's counts. Raises OutputError.
    """
    if given := os.environ.get(TOKEN, "").strip():
        return given, None
    if not needed:
        return "", None
    path = workspace / "token"
    try:
        if path.is_file() and (kept := path.read_text(encoding="utf-8").strip()):
            return kept, path
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {path}", "remove it, and another one is made") from error
    token = secrets.token_urlsafe(32)
    with atomic(path) as temporary:
        try:
            temporary.chmod(0o600)
            temporary.write_text(token + "\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(path, error) from error
    return token, path
