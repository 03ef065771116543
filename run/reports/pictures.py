"""Pictures: the visible patches of a batch; what each mask keeps of the same images, what a model
attends to, what resembles a caption.

Letters: n images, L patches, (rows, columns) their grid, P patch side, H x W image sides.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.loader import plan
from glimpse.data.masking import parse
from glimpse.data.patches import patchify, unpatchify
from glimpse.data.shards import Shards
from glimpse.data.tokenizer import pack
from glimpse.data.transforms import center_view, decode
from glimpse.model.layers import Watch
from glimpse.model.methods.attentive import Attentive, take
from glimpse.run.lib.config import Run
from glimpse.run.lib.distributed import to_device

GREY, IMAGES, COLUMNS = 128, 16, 8
MASKS = ("random(0.5)", "gaussian(0.5)", "inverse_gaussian(0.5)")
# dark to bright: Matplotlib's inferno
HEAT = torch.tensor([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def examples(shards: Shards, count: int = 8) -> tuple[list[bytes], list[str]] | None:
    """The images and captions of so many samples, spread over the shards; what cannot be read is
    left out, None where that is all.
    """
    found = []
    for i in range(count):
        try:
            sample = shards[i * len(shards) // count]
            decode(sample.image)
            found.append((sample.image, sample.caption))
        except (ValueError, OSError):
            continue
    return tuple(map(list, zip(*found))) or None


def masked_inputs(part: dict, cfg: Run) -> Tensor:
    """The first images of each view of a part as one picture, (3, H, W) uint8; a row of eight
    images under another.
    """
    rows = []
    for name, _, _, grid in plan(cfg.views, cfg.model.image_size, cfg.model.patch):
        view = part["views"][name]
        patches, positions = view["patches"][:IMAGES].cpu(), view["positions"][:IMAGES].cpu().long()
        images = framed(placed(patches, positions, cfg.model.patch, grid))
        short = -len(images) % COLUMNS
        images = torch.cat([images, images.new_full((short, *images.shape[1:]), 255)])
        rows += [torch.cat(list(row), dim=2) for row in images.split(COLUMNS)]
    wide = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, wide - row.shape[2]), value=255) for row in rows], dim=1)


def placed(patches: Tensor, positions: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(n, K, 3 P P) uint8 at (n, K) -> images (n, 3, H, W), grey where no patch is."""
    whole = torch.full((len(patches), grid[0] * grid[1], patches.shape[2]), GREY, dtype=torch.uint8)
    return unpatchify(
        whole.scatter_(1, positions[:, :, None].expand_as(patches), patches), patch, grid
    )


def framed(images: Tensor) -> Tensor:
    """With a white line to the right of and below each."""
    return F.pad(images, (0, 2, 0, 2), value=255)


@torch.no_grad()
def gallery(
    method, cfg: Run, tokenizer, images: list[bytes], captions: list[str]
) -> dict[str, Tensor]:
    """{column: (n, 3, H, W) uint8} for encoded images; all ranks must call, with the same
    images.
    """
    view = next(iter(cfg.views.values()))
    pixels = [
        center_view(image, cfg.model.image_size, cfg.eval_crop, view.interpolation)
        for image in images
    ]
    whole = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    patches, grid = patchify(whole, cfg.model.patch), cfg.model.grid
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    scores, tokens = looked(method, **to_device(dict(patches=patches, positions=positions)))
    similar = resemblance(method, cfg, tokenizer, tokens, captions)
    noise = torch.from_numpy(np.random.default_rng(0).random(positions.shape, dtype=np.float32))
    keeps = {spec: parse(spec)(noise, grid) for spec in MASKS}
    # A-CLIP's own, or 2 x 2 patches
    block = getattr(
        cfg.options, "block", cfg.model.patch * (1 + (not any(side % 2 for side in grid)))
    )
    for strategy in ("low", "high"):
        keeps[f"attentive, {strategy}, blocks of {block} px"] = Attentive(
            strategy, block, cfg.model.patch, grid
        ).choose(scores, 0.5)
    columns = {
        name: placed(take(patches, keep), keep, cfg.model.patch, grid)
        for name, keep in keeps.items()
    }
    return {
        "image": whole,
        **columns,
        "attention": heat(scores, grid, whole),
        "resemblance": heat(similar, grid, whole),
    }


def looked(method, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the class token (n, L), of the teacher where there is one, and the student's
    patch tokens (n, L, D).
    """
    student, teacher = Watch(), Watch()
    tokens = method.towers.vision(patches, positions, watch=student)
    if hasattr(method, "teacher"):
        method.teacher.vision(patches, positions, watch=teacher)
    layers = teacher.layers or student.layers
    last = getattr(method.options, "layers", "all") == "last"
    return torch.stack(layers[-1:] if last else layers).mean(0)[:, 1:].float().cpu(), tokens[:, 1:]


def resemblance(method, cfg: Run, tokenizer, tokens: Tensor, captions: list[str]) -> Tensor:
    """(n, L): cosine of each patch's embedding and its image's caption's (MaskCLIP's figure 2)."""
    ids, lengths = pack(
        [cfg.data.fill(tokenizer(caption), tokenizer.pad_id) for caption in captions]
    )
    text = method.towers.encode_text(
        **to_device(dict(ids=ids, lengths=lengths, longest=int(lengths.max())))
    )
    embedded = method.towers.embed_image(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return torch.einsum("nle,ne->nl", embedded, text).float().cpu()


def heat(values: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """(n, L) -> (n, 3, H, W): each row from its smallest, dark, to its largest, bright, over the
    greyed image.
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    level = ((values - low) / (high - low).clamp(min=1e-12)).unflatten(1, grid)[:, None]
    level = F.interpolate(level, images.shape[2:], mode="nearest")[:, 0] * (len(HEAT) - 1)
    lower = level.floor().clamp(max=len(HEAT) - 2).long()
    part = (level - lower)[..., None]
    colour = HEAT[lower] * (1 - part) + HEAT[lower + 1] * part  # (n, H, W, 3)
    grey = images.float().mean(1)[..., None]
    return (0.75 * colour + 0.25 * grey).round().to(torch.uint8).permute(0, 3, 1, 2)


def sheet(columns: dict[str, Tensor]) -> Tensor:
    """A gallery as one picture (3, H, W): a row an image, a column a mask."""
    return torch.cat(
        [
            torch.cat(list(row), dim=2)
            for row in zip(*(framed(images) for images in columns.values()))
        ],
        dim=1,
    )
