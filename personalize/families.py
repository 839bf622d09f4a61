"""Which family a base belongs to, and what UIs call it. The rows themselves are in adapters/keys.py, the one home of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapters.architecture import A1111 as A1111
from .adapters.keys import FAMILIES, Family, UNet

UNKNOWN = Family("unknown", UNet((), (), 0, 0), (), "unknown", "unknown/lora")
TWO_TEXT_ENCODERS = ("sdxl", "sdxl-refiner")


def detect(unet: Mapping[str, Any]) -> Family:
    """The family of a UNet's config (`unet/config.json`); UNKNOWN if no row fits, which still trains and draws."""
    key = tuple(unet.get("block_out_channels", ())), unet.get("cross_attention_dim")
    return next((family for family in FAMILIES if (family.unet.channels, family.unet.context) == key), UNKNOWN)
