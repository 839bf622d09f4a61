"""What an image says of how it was drawn, as JSON inside its PNG. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def read_record(path: Path) -> Mapping[str, Any]:
    """The JSON that `save_picture` wrote into a PNG; empty for other pictures."""
    with Image.open(path) as picture:
        return dict(json.loads(picture.info.get("personalize", "{}")))
