"""Positions and the patch bias, for formats that have a table of positions, the class token's
first, and no bias: open_clip, Hugging Face.

Fixed sin-cos positions become such a table, with zeros for the class token; a bias of the patch
embedding is added to every patch's row. That is the same model, but a sum cannot be taken apart. So
what was added up is kept in glimpse.safetensors beside what is written:

    write(file, tensors, model, rules, dtype)
        theirs, such a table in fp32 whatever `dtype` is; and what was lost
    cfg, tensors = taken(folder, cfg, rules, name, theirs)
        instead of `imported`

On the way in it counts only where adding up again gives the foreign table bit for bit; after a
fine-tuning elsewhere it does not, and the table is taken as it is: learned positions, no bias.
`rules`: ModelConfig -> its table of rules, one of which is position_rule's.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model import tensor_files
from glimpse.model.convert.rules import Rule, as_tuple, exported, imported
from glimpse.model.layers import sincos
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import Portable
from glimpse.model.towers import ModelConfig

KEPT = "glimpse.safetensors"
Rules = Callable[[ModelConfig], list[Rule]]


def position_rule(cfg: ModelConfig, name: str) -> Rule:
    """Our positions and patch bias, as many of them as `cfg` has -> the foreign table `name` (1 +
    L, D).
    """
    bias = ("vision.patch.bias",) if cfg.vision.patch_bias else ()
    if cfg.vision.positions == "sincos":
        return Rule(
            bias,
            (name,),
            out=lambda *bias: folded(fixed(cfg), *bias),
            back=lambda table: (),
            folded=cfg.vision.patch_bias,
        )
    if bias:
        return Rule(("vision.positions", *bias), (name,), out=folded, folded=True)
    return Rule(("vision.positions",), (name,))


def fixed(cfg: ModelConfig) -> Tensor:
    """Sin-cos positions as a table, (1 + L, D)."""
    return torch.cat([torch.zeros(1, cfg.shape.width), sincos(cfg.grid, cfg.shape.width)])


def is_fixed(table: Tensor, cfg: ModelConfig) -> bool:
    """Are these (1 + L, D) the sin-cos ones, as near as rounding leaves them? FLIP computes them in
    fp32, 2e-6 off; MAE's are equal.
    """
    eps = torch.finfo(table.dtype).eps if table.is_floating_point() else 0
    if cfg.shape.width % 4 or table.shape != (wanted := fixed(cfg)).shape:
        return False
    return torch.allclose(table.float(), wanted, rtol=eps, atol=4e-6)


def folded(table: Tensor, bias: Tensor | None = None) -> Tensor:
    """(1 + L, D) with the bias (D,), if there is one, added to the patches' rows."""
    if bias is None:
        return table
    table = table.float().to(bias.device)
    return torch.cat([table[:1], table[1:] + bias])


def write(
    file: Path, tensors: Tensors, model: Portable, rules: list[Rule], dtype: torch.dtype
) -> None:
    """A format's file of weights, `tensors` as its rules make them, and beside it what is lost in
    folding.

    What is computed stays in fp32: rounded, a library that has but the table would give other
    embeddings than we do.
    """
    computed = [name for rule in rules if rule.folded or not rule.ours for name in rule.theirs]
    tensor_files.write(file, exported(rules, tensors), dtype, exact=computed)
    keep(file.parent, model, rules)


def keep(folder: Path, model: Portable, rules: list[Rule]) -> None:
    """Write into the folder those of our tensors that are lost in folding."""
    lost = [name for rule in rules if rule.folded for name in rule.ours]
    if lost:
        tensor_files.write(
            folder / KEPT,
            model.tensors.renamed({name: name for name in lost}),
            about={"model": json.dumps(asdict(model.cfg))},
        )


def taken(
    folder: Path, cfg: ModelConfig, rules: Rules, name: str, theirs: Tensors, whose: str
) -> tuple[ModelConfig, Tensors]:
    """Foreign tensors as ours, and the architecture with what only tensors tell: `cfg` is what
    their files say, learned and unbiased.

    name: the foreign table of positions.  ValueError: see `imported`.
    """
    if (folder / KEPT).exists() and (found := unfolded(folder / KEPT, cfg, rules, theirs, whose)):
        return found
    if name in theirs and theirs.meta[name].shape == (
        1 + cfg.grid[0] * cfg.grid[1],
        cfg.shape.width,
    ):
        table = theirs[name]
        if is_fixed(table, cfg):
            cfg = replace(cfg, vision=replace(cfg.vision, positions="sincos"))
    return cfg, imported(rules(cfg), theirs, whose)


def unfolded(
    path: Path, cfg: ModelConfig, rules: Rules, theirs: Tensors, whose: str
) -> tuple[ModelConfig, Tensors] | None:
    """With the tensors of the file at `path`; None where they do not add up to theirs."""
    kept = tensor_files.read(path)
    try:
        was = json.loads(tensor_files.metadata(path)["model"])
        lost = {key: was["vision"][key] for key in ("positions", "patch_bias", "freeze_patch")}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: not what a conversion wrote; remove it, and the positions are taken as"
            " they are"
        ) from None
    cfg = replace(cfg, init=was["init"], vision=replace(cfg.vision, **lost))
    table, rest = rules(cfg), dict(theirs.meta)
    for rule in table:
        if rule.folded:
            if not all(name in kept for name in rule.ours) or not all(
                name in theirs for name in rule.theirs
            ):
                return None
            try:
                sums = as_tuple(rule.out(*(kept[name] for name in rule.ours)))
            except RuntimeError:  # of torch: of another model's shapes
                return None
            if not all(
                torch.equal(made.to(theirs.meta[name].dtype), theirs[name])
                for name, made in zip(rule.theirs, sums)
            ):
                return None
            for name in rule.theirs:
                del rest[name]
    ours = imported([rule for rule in table if not rule.folded], Tensors(rest, theirs.get), whose)
    return cfg, Tensors(
        ours.meta | kept.meta, lambda name: kept[name] if name in kept else ours[name]
    )
