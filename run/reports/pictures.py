"""Pictures of masked inputs, masks, attention, and the similarity of patches to a caption.

    columns = build_gallery(method, cfg, tokenizer, images, captions)    {column: (n, 3, H, W)}
    picture = tile_gallery(columns)                                      (3, H, W) uint8

Letters: n images, L patches, K visible patches, (rows, columns) grid of patches, P patch side,
H x W image sides, D width of the vision tower.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.loader import MicroBatch, plan_views
from glimpse.data.masking import parse_mask
from glimpse.data.patches import patchify, unpatchify
from glimpse.data.shards import Shards
from glimpse.data.tokenizer import Tokenizer, pack
from glimpse.data.transforms import center_view, decode
from glimpse.model.layers import AttentionRecorder
from glimpse.model.methods.attentive import PatchSelector, gather_patches
from glimpse.model.methods.base import Method
from glimpse.run.lib.config import RunConfig
from glimpse.run.lib.distributed import to_device

GRAY = 128  # value of hidden patches
MAX_IMAGES = 16  # images per view in masked_inputs_picture
IMAGES_PER_ROW = 8
MASKS = ("random(0.5)", "gaussian(0.5)", "inverse_gaussian(0.5)")
# From dark to bright: colors of Matplotlib's inferno.
HEAT_COLORS = torch.tensor(
    [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]
)


def read_examples(shards: Shards, count: int = 8) -> tuple[list[bytes], list[str]] | None:
    """Return the encoded images and the captions of `count` samples, spread over the shards.

    Samples that cannot be read are left out. Return None if no sample can be read.
    """
    samples = []
    for i in range(count):
        try:
            sample = shards[i * len(shards) // count]
            decode(sample.image)
            samples.append((sample.image, sample.caption))
        except (ValueError, OSError):
            continue
    if not samples:
        return None
    images, captions = zip(*samples)
    return list(images), list(captions)


def masked_inputs_picture(micro_batch: MicroBatch, cfg: RunConfig) -> Tensor:
    """Return the first images of each view of a micro-batch as one picture (3, H, W) uint8."""
    # Rows of images, view by view.
    rows: list[Tensor] = []
    views = plan_views(cfg.views, cfg.model.image_size, cfg.model.patch_size)
    for name, _, _, grid in views:
        view = micro_batch["views"][name]
        patches = view["patches"][:MAX_IMAGES].cpu()  # (n, K, 3 P P)
        positions = view["positions"][:MAX_IMAGES].cpu().long()  # (n, K)
        images = add_frames(place_patches(patches, positions, cfg.model.patch_size, grid))
        # Fill the last row with white images.
        missing = -len(images) % IMAGES_PER_ROW
        blank = images.new_full((missing, *images.shape[1:]), 255)
        for row in torch.cat([images, blank]).split(IMAGES_PER_ROW):
            rows.append(torch.cat(list(row), dim=2))

    # Views may differ in width; pad all rows to the widest.
    width = max(row.shape[2] for row in rows)
    padded_rows = []
    for row in rows:
        gap = width - row.shape[2]
        padded_rows.append(F.pad(row, (0, gap), value=255))
    return torch.cat(padded_rows, dim=1)


def place_patches(patches: Tensor, positions: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Return images (n, 3, H, W) with patches at their positions, and gray elsewhere.

    patches: (n, K, 3 P P) uint8. positions: (n, K).
    """
    n, _, pixels = patches.shape
    canvas = torch.full((n, grid[0] * grid[1], pixels), GRAY, dtype=torch.uint8)
    canvas.scatter_(1, positions[:, :, None].expand_as(patches), patches)
    return unpatchify(canvas, patch, grid)


def add_frames(images: Tensor) -> Tensor:
    """Return the images with a white line to the right of and below each."""
    return F.pad(images, (0, 2, 0, 2), value=255)


@torch.no_grad()
def build_gallery(
    method: Method, cfg: RunConfig, tokenizer: Tokenizer, images: list[bytes], captions: list[str]
) -> dict[str, Tensor]:
    """Return {column: (n, 3, H, W) uint8} of encoded images.

    The columns are the image, what each mask keeps of it, the class token's attention, and the
    similarity to the caption. All ranks must call this with the same images.
    """
    # 1. The images, and the model's attention and similarities.
    view = next(iter(cfg.views.values()))
    pixels = [
        center_view(image, cfg.model.image_size, cfg.eval_crop, view.interpolation)
        for image in images
    ]
    originals = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    patches = patchify(originals, cfg.model.patch_size)
    grid = cfg.model.grid
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    attention, tokens = attend(method, **to_device(dict(patches=patches, positions=positions)))
    similarity = caption_similarity(method, cfg, tokenizer, tokens, captions)

    # 2. The patches that each mask keeps, with the same noise for all masks.
    noise = np.random.default_rng(0).random(positions.shape, dtype=np.float32)
    noise = torch.from_numpy(noise)
    visible_positions = {spec: parse_mask(spec)(noise, grid) for spec in MASKS}
    # Attentive masks choose blocks of the size in A-CLIP's options, by default 2 x 2 patches if
    # the grid can be divided into them.
    is_even = all(side % 2 == 0 for side in grid)
    default_block = 2 * cfg.model.patch_size if is_even else cfg.model.patch_size
    block = getattr(cfg.options, "block", default_block)
    for strategy in ("low", "high"):
        mask = PatchSelector(strategy, block, cfg.model.patch_size, grid)
        name = f"attentive, {strategy}, blocks of {block} px"
        visible_positions[name] = mask.choose(attention, 0.5)

    # 3. The columns.
    columns = {"image": originals}
    for name, visible in visible_positions.items():
        columns[name] = place_patches(
            gather_patches(patches, visible), visible, cfg.model.patch_size, grid
        )
    columns["attention"] = heat_maps(attention, grid, originals)
    columns["similarity"] = heat_maps(similarity, grid, originals)
    return columns


def attend(method: Method, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class token's attention (n, L) and the student's patch tokens (n, L, D).

    The attention is the mean over layers and heads, of the teacher if the method has one.
    """
    student = AttentionRecorder()
    teacher = AttentionRecorder()
    tokens = method.towers.vision(patches, positions, recorder=student)
    if hasattr(method, "teacher"):
        method.teacher.vision(patches, positions, recorder=teacher)
    layers = teacher.layers or student.layers
    if getattr(method.options, "layers", "all") == "last":
        layers = layers[-1:]
    attention = torch.stack(layers).mean(0)[:, 1:]
    return attention.float().cpu(), tokens[:, 1:]


def caption_similarity(
    method: Method, cfg: RunConfig, tokenizer: Tokenizer, tokens: Tensor, captions: list[str]
) -> Tensor:
    """Return the cosine (n, L) of each patch token and its image's caption (MaskCLIP, figure 2)."""
    rows = [cfg.data.pad(tokenizer(caption), tokenizer.pad_id) for caption in captions]
    ids, lengths = pack(rows)
    inputs = to_device(dict(ids=ids, lengths=lengths, longest=int(lengths.max())))
    text = method.towers.encode_text(**inputs)
    embedded = method.towers.embed_image(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return torch.einsum("nle,ne->nl", embedded, text).float().cpu()


def heat_maps(values: Tensor, grid: tuple[int, int], images: Tensor) -> Tensor:
    """Return (n, 3, H, W): values (n, L) as colors over the gray image.

    For each image the smallest value is dark and the largest is bright.
    """
    # Position of each pixel on the color scale, from 0 to len(HEAT_COLORS) - 1.
    low = values.amin(1, keepdim=True)
    high = values.amax(1, keepdim=True)
    level = ((values - low) / (high - low).clamp(min=1e-12)).unflatten(1, grid)[:, None]
    level = F.interpolate(level, images.shape[2:], mode="nearest")[:, 0] * (len(HEAT_COLORS) - 1)

    # Interpolate between the two nearest colors of the scale.
    index = level.floor().clamp(max=len(HEAT_COLORS) - 2).long()
    fraction = (level - index)[..., None]
    lower = HEAT_COLORS[index]
    upper = HEAT_COLORS[index + 1]
    color = lower * (1 - fraction) + upper * fraction  # (n, H, W, 3)
    gray = images.float().mean(1)[..., None]
    blended = 0.75 * color + 0.25 * gray
    return blended.round().to(torch.uint8).permute(0, 3, 1, 2)


def tile_gallery(columns: dict[str, Tensor]) -> Tensor:
    """Return a gallery as one picture (3, H, W), with a row per image and a column per mask."""
    framed_columns = [add_frames(images) for images in columns.values()]
    rows = [torch.cat(row, dim=2) for row in zip(*framed_columns)]
    return torch.cat(rows, dim=1)
