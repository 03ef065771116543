"""Methods that a config may name.

model/methods/base.py defines what a method is; to add one: a file here and its row in METHODS.
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
    """Build the method of a run's config (run/lib/config.py); vocab: rows of the token table."""
    return METHODS[cfg.method](cfg.model, vocab, cfg.data.context, cfg.options)
