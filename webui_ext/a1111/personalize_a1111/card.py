"""The host's model on the card: it makes room while a training runs there, and comes back afterwards."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from personalize_studio import Bridge
from personalize_studio.service import ask

# What a host's model may raise, and a fork that is built otherwise
HOST_ERRORS = (RuntimeError, AttributeError, TypeError, ValueError, ImportError)
EVERY = 1.0  # seconds between two looks at the jobs; a training takes longer until it needs the card
RUNNING = "/api/jobs?state=running&kind=train&kind=batch&limit=1"


class Card:
    """Watches the jobs of the studio, in a thread, while this UI uses it."""

    def __init__(self, bridge: Bridge, wants: Callable[[str], bool]) -> None:
        """`wants` tells the settings `personalize_unload` and `personalize_load_back` as they are now."""
        self.bridge, self.wants = bridge, wants
        self.is_away = False
        self._one, self._end = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Watch from now on, as long as the host lives or until `stop`."""
        self._end.set()
        self._end = threading.Event()
        threading.Thread(target=self._watch, args=(self._end,), name="personalize", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self._end.set()

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(EVERY):
            try:
                if self.bridge.service.lease or self.is_away:
                    self.look()
            except HOST_ERRORS:
                traceback.print_exc()  # into the host's log, as it does itself

    def look(self) -> None:
        """Unload the host's model if a training runs on its card; load it back if none does any more."""
        busy = self.is_training()
        if busy and not self.is_away and self.wants("personalize_unload") and self.shares_card():
            with self._one:
                self.is_away = True  # also where that fails: it is tried once for each training
                unload()
        elif not busy and self.is_away and self.wants("personalize_load_back"):
            self.load_back()

    def load_back(self) -> None:
        """Bring the model back, if it is away: also because somebody wants to draw now."""
        with self._one:
            if self.is_away:
                load_back()
                self.is_away = False

    def is_training(self) -> bool:
        """Whether a training runs; a service that does not answer runs none."""
        upstream = self.bridge.service.find()
        if not upstream:
            return False
        with contextlib.suppress(OSError, ValueError), ask(upstream, RUNNING) as answer:
            return bool(json.load(answer)["data"])
        return False

    def shares_card(self) -> bool:
        """Whether trainings run on the card that the host draws with."""
        device = getattr(sys.modules.get("modules.devices"), "device", None)
        if getattr(device, "type", "cpu") != "cuda":
            return False
        own = f"cuda:{getattr(device, 'index', None) or 0}"
        devices = self.bridge.service.settings.devices
        return not devices or own in devices or "cuda" in devices


def unload() -> None:
    """Move the host's model off the card, when it is not drawing. Forge and its kin load what they need by themselves again."""
    from modules import devices, sd_models

    model = getattr(getattr(sd_models, "model_data", None), "sd_model", None)
    if model is None:  # nothing was loaded yet; asking for it would load it
        return
    in_turn(sd_models.unload_model_weights)
    devices.torch_gc()


def load_back() -> None:
    """Bring it back where the host does not do so itself: A1111 (send_model_to_device), reForge (load_model_to_device)."""
    from modules import sd_models

    model = getattr(getattr(sd_models, "model_data", None), "sd_model", None)
    bring = getattr(sd_models, "load_model_to_device", None) or getattr(sd_models, "send_model_to_device", None)
    if model is not None and bring:
        in_turn(lambda: bring(model))


def in_turn(work: Callable[[], Any]) -> None:
    """Do something with the model while nothing is drawn: behind the host's queue, and in the thread of Forge's."""
    from modules.call_queue import queue_lock

    try:
        from modules_forge import main_thread
    except ImportError:
        with queue_lock:
            work()
    else:
        with queue_lock:
            main_thread.run_and_wait_result(work)
