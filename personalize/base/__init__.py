"""Base: a frozen diffusion model with four verbs: encode, embed, denoise, decode. Only safetensors are read, never pickles.

model.py     Base, and how it is loaded
sources.py   what a name stands for: pocket, a folder, a file, a hub id
folder.py    diffusers folders          single.py  single-file checkpoints       loaded.py  what either gives
text.py      text encoders: long prompts, clip skip, weights       emphasis.py  (word:1.2)       tokens.py  CLIP's tokenizer
cond.py      Cond: what the UNet is conditioned on                 schedule.py  Schedule: noise and prediction type
"""

from .cond import Cond
from .folder import load_model
from .model import Base, device_of, family_at, quiet
from .schedule import Schedule
from .sources import CONFIGS, NAMED, locate, read_json
from .tokens import load_tokenizer

__all__ = [
    "CONFIGS",
    "NAMED",
    "Base",
    "Cond",
    "Schedule",
    "device_of",
    "family_at",
    "load_model",
    "load_tokenizer",
    "locate",
    "quiet",
    "read_json",
]
