"""Make the reference libraries importable with a torchvision built for another torch.

With a CPU build of torch, PyPI's torchvision cannot load its compiled operators. Its import then
fails, and with it the imports of open_clip, timm and parts of transformers, although Glimpse uses
none of these operators. Importing this module first declares the two operators that torchvision
needs for its import.
"""

import importlib.abc
import sys

import torch


class DefineOperators(importlib.abc.MetaPathFinder):
    """Declare, before torchvision's first import, the two operators that it registers fakes for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, operator):
                    self.library.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )
            sys.modules["_torchvision_operators"] = self  # keeps the library alive
        return None


sys.meta_path.insert(0, DefineOperators())
