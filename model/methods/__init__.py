"""The methods that a config may name.

model/methods/base.py says what a method is; to add one: a file here and its row in METHODS.
"""

from model.methods.aclip import Aclip
from model.methods.clip import Clip
from model.methods.mae import Mae
from model.methods.maskclip import MaskClip
from model.methods.slip import Slip

METHODS = {"clip": Clip, "slip": Slip, "mae": Mae, "maskclip": MaskClip, "aclip": Aclip}
