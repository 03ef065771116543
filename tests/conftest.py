"""What every test shares: the peers' torchvision on a CPU build of torch, whose compiled operators it cannot load."""
import importlib.abc
import sys


class DefineOperators(importlib.abc.MetaPathFinder):
    """Before torchvision is first imported, declare the two operators that it registers fakes for."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, operator):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["_torchvision_operators"] = self  # keeps the library alive
        return None


sys.meta_path.insert(0, DefineOperators())
