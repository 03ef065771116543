"""Glimpse: CLIP-style pretraining from the visible patches of masked images, under DeepSpeed.

This package is the import name: `glimpse.data`, `glimpse.model` and `glimpse.run` are the folders
data/, model/ and run/ of a checkout, or the packages that an installation put in their place.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "ds_configs").is_dir():
    __path__.append(str(_checkout))
