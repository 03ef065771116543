"""Batches like those of a config's loader, of random pixels and captions of a chosen mean length.

Benchmarks measure, and the planner plans, with them.
Letters: B samples, L patches, K visible ones, P patch side.
"""

import torch
from torch import Tensor

from glimpse.data.loader import plan
from glimpse.data.transforms import draws
from glimpse.model.methods import METHODS
from glimpse.run.lib.config import RunConfig


def caption_lengths(cfg: RunConfig, tokens: float, batch: int) -> list[int]:
    """Return the tokens of each of B captions; all have the full context if padded.

    They alternate between half and one and a half times the mean, or as near to these as 1 and the
    context allow.
    """
    if cfg.data.pad_text:
        return [cfg.data.context] * batch
    spread = min(tokens / 2, cfg.data.context - tokens, tokens - 1)
    if spread < 0:
        raise ValueError(
            f"{tokens:g} tokens of a caption: from 1 to data.context, {cfg.data.context}"
        )
    low = round(tokens - spread)
    high = round(tokens + spread)
    counts = [high, low] * (batch // 2)
    if batch % 2:
        counts.append(round(tokens))
    return counts


def visible_patches(cfg: RunConfig) -> dict[str, int]:
    """Return K of each view, as the loader sends it."""
    counts = {}
    for name, _, mask, grid in plan(cfg.views, cfg.model.image_size, cfg.model.patch):
        rows, columns = grid
        counts[name] = mask.visible(rows * columns)
    return counts


def draw_names(cfg: RunConfig, views: tuple[str, ...]) -> set[str]:
    """Return the names of all draws of some views."""
    return {draw for name in views for draw in draws(name, cfg.views[name])}


def random_pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_micro_batch(cfg: RunConfig, tokens: float, batch: int) -> dict:
    """Return a micro-batch (data/loader.py) whose captions have `tokens` tokens on average.

    Under FakeTensorMode it takes no memory.
    """
    method = METHODS[cfg.method]
    hidden_views = draw_names(cfg, method.hidden)
    noise_views = draw_names(cfg, method.noise)
    side = 256.0  # of a source image, in pixels
    values = 3 * cfg.model.patch**2  # of a patch

    # Views: patches, and what else the method reads of each.
    views = {}
    for name, _, mask, grid in plan(cfg.views, cfg.model.image_size, cfg.model.patch):
        L = grid[0] * grid[1]
        K = mask.visible(L)
        # Costs depend on the number of visible patches only, so that any K will do.
        order = torch.rand(batch, L).argsort(1)
        keep = order[:, :K].sort(1).values
        hide = order[:, K:].sort(1).values
        view = dict(patches=random_pixels(batch, K, values), positions=keep.to(torch.int16))
        if method.enclosing:
            corner = torch.rand(batch, 2) * side / 8
            size = torch.full((batch, 2), 0.75 * side)
            view["box"] = torch.cat([corner, size], 1)
        if name in noise_views:
            view["noise"] = torch.rand(batch, L)
        if name in hidden_views:
            view["hidden"] = random_pixels(batch, L - K, values)
            view["hidden_positions"] = hide.to(torch.int16)
        views[name] = view

    # Captions, packed end to end.
    counts = caption_lengths(cfg, tokens, batch)
    text = dict(
        ids=torch.randint(1, 250, (sum(counts),), dtype=torch.int32),
        lengths=torch.tensor(counts),
        longest=max(counts),
    )
    return dict(views=views, text=text)
