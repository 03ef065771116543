"""Table of the methods, by the name that a config gives under `method:`.

base.py defines the interface. To add a method, add a module to this package and a row to METHODS.
"""

from glimpse.model.methods.aclip import Aclip
from glimpse.model.methods.base import Method
from glimpse.model.methods.clip import Clip
from glimpse.model.methods.mae import Mae
from glimpse.model.methods.maskclip import MaskClip
from glimpse.model.methods.slip import Slip

METHODS: dict[str, type[Method]] = {
    "clip": Clip,
    "slip": Slip,
    "mae": Mae,
    "maskclip": MaskClip,
    "aclip": Aclip,
}


def build_method(cfg, vocab: int) -> Method:
    """Build the method of a RunConfig (run/lib/config.py); vocab: the number of token ids."""
    return METHODS[cfg.method](cfg.model, vocab, cfg.data.context, cfg.options)
