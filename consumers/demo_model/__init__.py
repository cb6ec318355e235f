"""The demo model: a very small language model that answers a few kinds of questions right and says so of all others."""

from pathlib import Path
from typing import Final

MODEL_NAME: Final = "headrace-demo"
PATH: Final = Path(__file__).parent / "weights"
"""The folder that ``mlx_lm.load`` takes."""
