"""Positions and patch bias in formats that have one table: the same model, and bit for bit our
tensors on the way back.
"""

from dataclasses import replace

import pytest
import torch

from glimpse.model import tensor_files
from glimpse.model.convert.positions import KEPT, fixed, keep, position_rule, taken
from glimpse.model.convert.rules import Rule, exported
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import Portable
from glimpse.model.towers import ModelConfig, Towers
from glimpse.model.vision import VisionConfig

PLAIN = ModelConfig(
    "nano/32", image_size=96, vision=VisionConfig(positions="learned", patch_bias=False)
)


def rules(cfg):
    """All tensors under their own names but positions and bias."""
    names = [
        n
        for n, _ in Towers(cfg, 5, 3).named_parameters()
        if n not in ("vision.positions", "vision.patch.bias")
    ]
    return [*(Rule((n,), (n,)) for n in names), position_rule(cfg, "table")]


def model(positions, bias):
    cfg = replace(
        PLAIN,
        init="clip",
        vision=replace(PLAIN.vision, positions=positions, patch_bias=bias, freeze_patch=True),
    )
    towers = Towers(cfg, 5, 3)
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter)
    return Portable(cfg, 5, 3, Tensors.held({n: p.detach() for n, p in towers.named_parameters()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "positions, bias", [("learned", False), ("learned", True), ("sincos", False), ("sincos", True)]
)
def test_there_and_back(tmp_path, positions, bias, dtype):
    ours = model(positions, bias)
    tensor_files.write(
        tmp_path / "theirs.safetensors", exported(rules(ours.cfg), ours.tensors), dtype
    )
    keep(tmp_path, ours, rules(ours.cfg))
    assert (tmp_path / KEPT).exists() == bias
    theirs = tensor_files.read(tmp_path / "theirs.safetensors")
    cfg, tensors = taken(tmp_path, PLAIN, rules, "table", theirs, "here")
    assert cfg == (
        ours.cfg if bias else replace(PLAIN, vision=replace(PLAIN.vision, positions=positions))
    )
    assert tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        # kept as they were, whatever the rest is rounded to
        whole = bias and name in ("vision.positions", "vision.patch.bias")
        assert torch.equal(tensors[name], tensor if whole else tensor.to(dtype)), name


def test_the_table_is_what_the_tower_adds(tmp_path):
    """A tower with sin-cos positions and a bias, and one with the table it becomes, see the
    same.
    """
    ours = model("sincos", True)
    tensor_files.write(tmp_path / "theirs.safetensors", exported(rules(ours.cfg), ours.tensors))
    cfg, tensors = taken(
        tmp_path, PLAIN, rules, "table", tensor_files.read(tmp_path / "theirs.safetensors"), "here"
    )
    assert cfg == PLAIN and torch.equal(
        tensors["vision.positions"][1:], fixed(PLAIN)[1:] + ours.tensors["vision.patch.bias"]
    )
    patches, places = torch.randn(2, 9, 3 * 32 * 32), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        a, b = (
            Portable(c, 5, 3, t).towers().vision(patches, places)
            for c, t in ((ours.cfg, ours.tensors), (cfg, tensors))
        )
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_tuned_elsewhere_the_table_counts(tmp_path):
    """The tensors beside no longer add up to it; nor do those of another model's shape."""
    ours = model("sincos", True)
    made = {
        name: tensor.clone() for name, tensor in exported(rules(ours.cfg), ours.tensors).items()
    }
    keep(tmp_path, ours, rules(ours.cfg))
    made["table"][3, 5] += 1e-3
    cfg, tensors = taken(tmp_path, PLAIN, rules, "table", Tensors.held(made), "here")
    assert cfg == PLAIN and torch.equal(tensors["vision.positions"], made["table"])
    tensor_files.write(
        tmp_path / KEPT,
        Tensors.held({"vision.patch.bias": torch.zeros(7)}),
        about=tensor_files.metadata(tmp_path / KEPT),
    )
    assert taken(tmp_path, PLAIN, rules, "table", Tensors.held(made), "here")[0] == PLAIN


def test_a_table_that_is_missing_or_of_another_grid_is_named(tmp_path):
    made = dict(exported(rules(PLAIN), model("learned", False).tensors))
    with pytest.raises(ValueError, match="here: table is missing"):
        taken(
            tmp_path,
            PLAIN,
            rules,
            "table",
            Tensors.held({n: t for n, t in made.items() if n != "table"}),
            "here",
        )
    cfg, tensors = taken(
        tmp_path,
        PLAIN,
        rules,
        "table",
        Tensors.held(made | {"table": torch.zeros(50, 128)}),
        "here",
    )
    with pytest.raises(
        ValueError, match=r"vision.positions is \(50, 128\); its architecture makes it \(10, 128\)"
    ):
        Portable(cfg, 5, 3, tensors)
