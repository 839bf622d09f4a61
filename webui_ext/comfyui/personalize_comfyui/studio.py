"""The one bridge of this process, and the service as nodes use it."""

from __future__ import annotations

import atexit
import threading

from ..personalize_studio import Bridge
from . import host
from .client import Client

PREFIX = "/personalize"
bridge = Bridge(host.settings, PREFIX)
_one = threading.Lock()
atexit.register(bridge.close)


def connect() -> Client:
    """The service, started where it does not run. Raises StudioError."""
    with _one:
        return Client(bridge.service)
