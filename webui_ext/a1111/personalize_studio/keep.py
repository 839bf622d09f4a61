"""The service's process: `python keep.py FOLDER ARGUMENTS` is `personalize ARGUMENTS`, and ends when no UI needs it any more.

It runs in the private environment. Everything is one process, so that nothing stays behind whoever is killed: a UI's lease
ends with the UI, and this process looks for leases itself.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from personalize_studio.lease import is_needed

EVERY = 1.0  # seconds between two looks
PATIENCE = 3  # looks that find nobody: a UI that restarts comes back
GRACE = 180.0  # seconds for trainings to save their state; behind it the process ends anyway


def watch(folder: Path) -> None:
    """End this process when nobody has needed it for a while."""
    absent = 0
    while absent < PATIENCE:
        time.sleep(EVERY)
        absent = 0 if is_needed(folder) else absent + 1
    signal.raise_signal(signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    leases, sys.argv = Path(sys.argv[1]), ["personalize", *sys.argv[2:]]
    threading.Thread(target=watch, args=(leases,), daemon=True).start()
    del sys.path[:2]  # nothing of the plugin stands in personalize's way
    runpy.run_module("personalize", run_name="__main__", alter_sys=True)
