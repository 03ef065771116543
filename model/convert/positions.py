"""Conversion of positions and of the patch bias, for formats (open_clip, Hugging Face) that have a
table of positions, the class token's row first, and no patch bias.

Fixed sin-cos positions become such a table, with zeros for the class token. A bias of the patch
embedding is added to the row of every patch. The model computes the same, but the terms cannot be
recovered from the sum. Therefore they are stored in glimpse.safetensors next to the foreign file:

    write_weights(file, tensors, model, rules, dtype)
        Write the foreign tensors and the terms. The table is fp32 for every `dtype`.
    cfg, tensors = import_with_positions(folder, cfg, rules, name, tensors, whose)
        Read both; replaces `import_tensors`.

The import uses the terms only if their sum equals the foreign table bit for bit. After fine-tuning
in another library it does not; then the table becomes learned positions, without a patch bias.
`rules` is a function that returns the rules of a ModelConfig, one of which is position_rule's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from glimpse.model import tensor_files
from glimpse.model.convert.rules import Rule, as_tuple, export_tensors, import_tensors
from glimpse.model.layers import sincos_positions
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import PortableModel
from glimpse.model.towers import ModelConfig

TERMS_FILE = "glimpse.safetensors"
Rules = Callable[[ModelConfig], list[Rule]]


def position_rule(cfg: ModelConfig, name: str) -> Rule:
    """Return the rule for the foreign table `name` (1 + L, D): it is computed from the positions
    and the patch bias that `cfg` has.
    """
    bias = ("vision.patch.bias",) if cfg.vision.patch_bias else ()
    if cfg.vision.positions == "sincos":

        def fold(*bias: Tensor) -> Tensor:
            return add_patch_bias(sincos_table(cfg), *bias)

        return Rule(
            bias, (name,), to_foreign=fold, from_foreign=no_tensors, is_lossy=cfg.vision.patch_bias
        )
    if bias:
        return Rule(("vision.positions", *bias), (name,), to_foreign=add_patch_bias, is_lossy=True)
    return Rule(("vision.positions",), (name,))


def no_tensors(table: Tensor) -> tuple[()]:
    """Return no tensors: sin-cos positions are not stored in Glimpse."""
    return ()


def sincos_table(cfg: ModelConfig) -> Tensor:
    """Return sin-cos positions as a table, (1 + L, D)."""
    width = cfg.shape.width
    return torch.cat([torch.zeros(1, width), sincos_positions(cfg.grid, width)])


def is_sincos(table: Tensor, cfg: ModelConfig) -> bool:
    """Return True if the positions (1 + L, D) equal the sin-cos positions up to rounding.

    FLIP computes them in fp32, with an error of 2e-6; MAE's are equal bit for bit.
    """
    if cfg.shape.width % 4:
        return False
    wanted = sincos_table(cfg)
    if table.shape != wanted.shape:
        return False
    eps = torch.finfo(table.dtype).eps if table.is_floating_point() else 0
    return torch.allclose(table.float(), wanted, rtol=eps, atol=4e-6)


def add_patch_bias(table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add the patch bias (D,), if there is one, to the patches' rows of the table (1 + L, D)."""
    if bias is None:
        return table
    table = table.float().to(bias.device)
    return torch.cat([table[:1], table[1:] + bias])


def write_weights(
    file: Path, tensors: LazyTensors, model: PortableModel, rules: list[Rule], dtype: torch.dtype
) -> None:
    """Convert the tensors by the rules and write them, and the terms of lossy rules next to them.

    Computed tensors stay in fp32: a library that reads a rounded table would compute embeddings
    that differ from Glimpse's.
    """
    computed: list[str] = []
    for rule in rules:
        if rule.is_lossy or not rule.glimpse_names:
            computed += rule.foreign_names
    tensor_files.write_safetensors(file, export_tensors(rules, tensors), dtype, exact=computed)
    write_terms(file.parent, model, rules)


def write_terms(folder: Path, model: PortableModel, rules: list[Rule]) -> None:
    """Write the tensors that lossy rules lose to TERMS_FILE in the folder."""
    lost: list[str] = []
    for rule in rules:
        if rule.is_lossy:
            lost += rule.glimpse_names
    if lost:
        tensors = model.tensors.rename({name: name for name in lost})
        about = {"model": json.dumps(asdict(model.cfg))}
        tensor_files.write_safetensors(folder / TERMS_FILE, tensors, about=about)


def import_with_positions(
    folder: Path, cfg: ModelConfig, rules: Rules, name: str, tensors: LazyTensors, whose: str
) -> tuple[ModelConfig, LazyTensors]:
    """Convert foreign tensors; return the completed architecture and the tensors of Glimpse.

    cfg: the architecture according to the foreign files, with learned positions and no patch bias.
    name: the foreign table of positions. whose: the file or folder for errors. ValueError: see
    `import_tensors`.
    """
    if (folder / TERMS_FILE).exists():
        result = import_with_terms(folder / TERMS_FILE, cfg, rules, tensors, whose)
        if result is not None:
            return result
    shape = (1 + math.prod(cfg.grid), cfg.shape.width)
    has_table = name in tensors and tensors.meta[name].shape == shape
    if has_table and is_sincos(tensors[name], cfg):
        cfg = replace(cfg, vision=replace(cfg.vision, positions="sincos"))
    return cfg, import_tensors(rules(cfg), tensors, whose)


def import_with_terms(
    path: Path, cfg: ModelConfig, rules: Rules, tensors: LazyTensors, whose: str
) -> tuple[ModelConfig, LazyTensors] | None:
    """Convert foreign tensors with the terms in the file at `path`.

    None if the sums of the terms differ from the foreign tensors.
    """
    # Read the terms, and the architecture that they belong to.
    terms = tensor_files.read_tensors(path)
    try:
        source = json.loads(tensor_files.read_metadata(path)["model"])
        vision = source["vision"]
        lost = {key: vision[key] for key in ("positions", "patch_bias", "freeze_patch")}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: not written by run/convert.py, or damaged; without this file the positions"
            " are imported as learned positions: remove it"
        ) from None
    cfg = replace(cfg, init=source["init"], vision=replace(cfg.vision, **lost))

    # Replace the foreign tensors that are sums of terms by the terms.
    table = rules(cfg)
    rest = dict(tensors.meta)
    for rule in table:
        if rule.is_lossy:
            if not matches_sums(rule, terms, tensors):
                return None
            for name in rule.foreign_names:
                del rest[name]
    plain_rules = [rule for rule in table if not rule.is_lossy]
    plain_tensors = import_tensors(plain_rules, LazyTensors(rest, tensors.__getitem__), whose)

    def get(name: str) -> Tensor:
        return terms[name] if name in terms else plain_tensors[name]

    return cfg, LazyTensors(plain_tensors.meta | terms.meta, get)


def matches_sums(rule: Rule, terms: LazyTensors, tensors: LazyTensors) -> bool:
    """Return True if the foreign tensors of a lossy rule equal those computed from the terms."""
    complete = all(name in terms for name in rule.glimpse_names)
    if not complete or not all(name in tensors for name in rule.foreign_names):
        return False
    try:
        sums = as_tuple(rule.to_foreign(*(terms[name] for name in rule.glimpse_names)))
    except RuntimeError:  # torch: the terms have the shapes of another model
        return False
    for name, total in zip(rule.foreign_names, sums):
        if not torch.equal(total.to(tensors.meta[name].dtype), tensors[name]):
            return False
    return True
