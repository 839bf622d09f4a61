"""What jobs have told so far: each event is read once, however many look."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from ..jobs import Store

MOST = 32  # jobs that are remembered


@dataclass
class Told:
    """The events of a job: losses by step, and all other records as they came."""

    number: int = 0  # of the last event
    losses: dict[int, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def kind(self, *names: str) -> list[dict[str, Any]]:
        """The records of some kinds."""
        return [record for record in list(self.records) if record.get("event") in names]


class Watch:
    """The events of jobs, remembered. For threads."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._jobs: OrderedDict[str, Told] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: str) -> Told:
        """What a job, by its whole id, has told up to now."""
        with self._lock:
            told = self._jobs.setdefault(job, Told())
            self._jobs.move_to_end(job)
            while len(self._jobs) > MOST:
                self._jobs.popitem(last=False)
        with told.lock:
            for number, record in self.store.events(job, told.number):
                told.number = number
                if record.get("event") != "step":
                    told.records.append(record)
                elif isinstance(loss := record.get("loss"), int | float) and isinstance(step := record.get("step"), int):
                    told.losses[step] = float(loss)
        return told
