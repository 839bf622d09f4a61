"""The embedded base: an ordinary diffusers folder of weights, the world it was pretrained on, and its recipe."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
