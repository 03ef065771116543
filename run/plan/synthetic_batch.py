"""Random micro-batches with the shapes of a config's loader, for benchmarks and the planner.

Pixels and token ids are random. The mean length of the captions is a parameter, because the cost of
the text tower depends on it.

Letters: B samples, L patches, K visible patches, P patch side.
"""

import torch
from torch import Tensor

from glimpse.data.loader import plan_views
from glimpse.data.transforms import view_names
from glimpse.model.methods import METHODS
from glimpse.run.lib.config import RunConfig

SOURCE_SIDE = 256.0  # pixels of a square source image, for the boxes of crops


def caption_lengths(cfg: RunConfig, tokens: float, batch: int) -> list[int]:
    """Return the numbers of tokens of B captions with mean `tokens`.

    Lengths alternate between 0.5 and 1.5 times the mean, or closer to it where 1 and data.context
    limit them. With data.pad_text every caption has data.context tokens.
    """
    if cfg.data.pad_text:
        return [cfg.data.context] * batch
    spread = min(tokens / 2, cfg.data.context - tokens, tokens - 1)
    if spread < 0:
        raise ValueError(
            f"--caption: {tokens:g} tokens is out of range; use 1 to data.context"
            f" ({cfg.data.context})"
        )
    low = round(tokens - spread)
    high = round(tokens + spread)
    lengths = [high, low] * (batch // 2)
    if batch % 2:
        lengths.append(round(tokens))
    return lengths


def visible_patches(cfg: RunConfig) -> dict[str, int]:
    """Return the number K of visible patches of each view."""
    counts = {}
    for name, _, mask, grid in plan_views(cfg.views, cfg.model.image_size, cfg.model.patch_size):
        rows, columns = grid
        counts[name] = mask.visible_count(rows * columns)
    return counts


def expand_view_names(cfg: RunConfig, views: tuple[str, ...]) -> set[str]:
    """Return the names of all draws of these views: view1 and view2 for a view with count 2."""
    return {draw for name in views for draw in view_names(name, cfg.views[name])}


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_micro_batch(cfg: RunConfig, tokens: float, batch: int) -> dict:
    """Return a micro-batch (data/loader.py) of B samples with a mean of `tokens` tokens a caption.

    Under FakeTensorMode it takes no memory.
    """
    method = METHODS[cfg.method]
    hidden_views = expand_view_names(cfg, method.hidden_patch_views)
    noise_views = expand_view_names(cfg, method.noise_views)
    patch_values = 3 * cfg.model.patch_size**2

    # Views: the visible patches, and the extra inputs that the method reads for each view.
    views = {}
    for name, _, mask, grid in plan_views(cfg.views, cfg.model.image_size, cfg.model.patch_size):
        L = grid[0] * grid[1]
        K = mask.visible_count(L)
        # A uniform choice is enough: costs depend on the number of visible patches only.
        order = torch.rand(batch, L).argsort(1)
        visible = order[:, :K].sort(1).values
        hidden = order[:, K:].sort(1).values
        view = dict(
            patches=random_pixels(batch, K, patch_values), positions=visible.to(torch.int16)
        )
        if method.enclosing_views:
            corner = torch.rand(batch, 2) * SOURCE_SIDE / 8
            size = torch.full((batch, 2), 0.75 * SOURCE_SIDE)
            view["box"] = torch.cat([corner, size], 1)
        if name in noise_views:
            view["noise"] = torch.rand(batch, L)
        if name in hidden_views:
            view["hidden"] = random_pixels(batch, L - K, patch_values)
            view["hidden_positions"] = hidden.to(torch.int16)
        views[name] = view

    # Captions, packed without padding.
    lengths = caption_lengths(cfg, tokens, batch)
    text = dict(
        ids=torch.randint(1, 250, (sum(lengths),), dtype=torch.int32),
        lengths=torch.tensor(lengths),
        longest=max(lengths),
    )
    return dict(views=views, text=text)
