"""A batch as a config's loader makes it, of random pixels and captions of a stated mean length:
what is measured and planned with.

Letters: B samples, L patches, K visible ones, P patch side.
"""

from functools import partial

import torch

from glimpse.data.loader import plan
from glimpse.data.transforms import draws
from glimpse.model.methods import METHODS
from glimpse.run.lib.config import Run


def lengths(cfg: Run, tokens: float, batch: int) -> list[int]:
    """Tokens of B captions: half and one and a half times the mean in turns, or as near as 1 and
    the context allow; all full if padded.
    """
    if cfg.data.pad_text:
        return [cfg.data.context] * batch
    spread = min(tokens / 2, cfg.data.context - tokens, tokens - 1)
    if spread < 0:
        raise ValueError(
            f"{tokens:g} tokens of a caption: from 1 to data.context, {cfg.data.context}"
        )
    low, high = round(tokens - spread), round(tokens + spread)
    return [high, low] * (batch // 2) + [round(tokens)] * (batch % 2)


def visible(cfg: Run) -> dict[str, int]:
    """K of each view, as the loader sends it."""
    return {
        name: mask.visible(grid[0] * grid[1])
        for name, _, mask, grid in plan(cfg.views, cfg.model.image_size, cfg.model.patch)
    }


def part(cfg: Run, tokens: float, batch: int) -> dict:
    """A part of a batch (data/loader.py) whose captions have `tokens` tokens on average; under
    FakeTensorMode it takes no memory.
    """
    method, views, side = METHODS[cfg.method], {}, 256.0
    hidden, noise = (
        {draw for name in some for draw in draws(name, cfg.views[name])}
        for some in (method.hidden, method.noise)
    )
    for name, _, mask, grid in plan(cfg.views, cfg.model.image_size, cfg.model.patch):
        L = grid[0] * grid[1]
        K = mask.visible(L)
        # which patches stay does not matter here, as long as so many do
        order = torch.rand(batch, L).argsort(1)
        keep, hide = order[:, :K].sort(1).values, order[:, K:].sort(1).values
        pixels = partial(torch.randint, 0, 256, dtype=torch.uint8)
        views[name] = dict(
            patches=pixels((batch, K, 3 * cfg.model.patch**2)), positions=keep.to(torch.int16)
        )
        if method.enclosing:
            views[name]["box"] = torch.cat(
                [torch.rand(batch, 2) * side / 8, torch.full((batch, 2), 0.75 * side)], 1
            )
        if name in noise:
            views[name]["noise"] = torch.rand(batch, L)
        if name in hidden:
            views[name] |= dict(
                hidden=pixels((batch, L - K, 3 * cfg.model.patch**2)),
                hidden_positions=hide.to(torch.int16),
            )
    each = lengths(cfg, tokens, batch)
    text = dict(
        ids=torch.randint(1, 250, (sum(each),), dtype=torch.int32),
        lengths=torch.tensor(each),
        longest=max(each),
    )
    return dict(views=views, text=text)
