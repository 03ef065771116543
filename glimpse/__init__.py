"""Glimpse: CLIP-style pretraining from the visible patches of masked images, under DeepSpeed.

This package only provides the import name. In a checkout, `glimpse.data`, `glimpse.model` and
`glimpse.run` are the folders data/, model/ and run/; an installation puts them inside this package.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "ds_configs").is_dir():
    __path__.append(str(_checkout))
