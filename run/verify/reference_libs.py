"""Preparation for importing other libraries' models beside a torchvision built for another torch.

PyPI's torchvision beside a CPU build of torch cannot load its compiled operators. It then fails on
import, and with it open_clip, timm and parts of transformers, though none of them needs those
operators here. Importing this file before them declares the two that torchvision asks for.
"""

import importlib.abc
import sys

import torch


class DefineOperators(importlib.abc.MetaPathFinder):
    """Declare the two operators that torchvision registers fakes for, before its first import."""

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
