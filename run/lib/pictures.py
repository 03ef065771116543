"""Pictures of what goes in: the visible patches of a batch, where they lie, the hidden ones grey."""
import torch
from torch import Tensor

from data.patches import unpatchify
from run.lib.config import Run

GREY, IMAGES, COLUMNS = 128, 16, 8


def masked_inputs(part: dict, cfg: Run) -> Tensor:
    """The first images of each view of a part as one picture, (3, H, W) uint8; a row of eight images under another."""
    rows = []
    for view in part["views"].values():
        patches, positions = view["patches"][:IMAGES].cpu(), view["positions"][:IMAGES].cpu().long()
        whole = torch.full((len(patches), cfg.model.grid[0] * cfg.model.grid[1], patches.shape[2]), GREY, dtype=torch.uint8)
        whole.scatter_(1, positions[:, :, None].expand_as(patches), patches)
        images = unpatchify(whole, cfg.model.patch, cfg.model.grid)  # (n, 3, H, W)
        images = torch.nn.functional.pad(images, (0, 2, 0, 2), value=255)
        short = -len(images) % COLUMNS
        images = torch.cat([images, images.new_full((short, *images.shape[1:]), 255)])
        rows += [torch.cat(list(row), dim=2) for row in images.split(COLUMNS)]
    return torch.cat(rows, dim=1)
