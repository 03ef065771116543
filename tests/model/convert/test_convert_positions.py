"""Positions and patch bias in formats that have one table: the same model, and bit for bit our
tensors on the way back.
"""

from dataclasses import replace

import pytest
import torch

from glimpse.model import tensor_files
from glimpse.model.convert.positions import (
    TERMS_FILE,
    import_with_positions,
    position_rule,
    sincos_table,
    write_terms,
)
from glimpse.model.convert.rules import Rule, export_tensors
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import PortableModel
from glimpse.model.towers import ModelConfig, Towers
from glimpse.model.vision import VisionConfig

PLAIN = ModelConfig(
    "nano/32", image_size=96, vision=VisionConfig(positions="learned", patch_bias=False)
)


def rules(cfg):
    """Return a table of all tensors under the same names, except positions and bias."""
    table = []
    for name, _ in Towers(cfg, 5, 3).named_parameters():
        if name not in ("vision.positions", "vision.patch.bias"):
            table.append(Rule((name,), (name,)))
    table.append(position_rule(cfg, "table"))
    return table


def model(positions, bias):
    vision = replace(PLAIN.vision, positions=positions, patch_bias=bias, freeze_patch=True)
    cfg = replace(PLAIN, init="clip", vision=vision)
    towers = Towers(cfg, 5, 3)
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter)
    tensors = {name: parameter.detach() for name, parameter in towers.named_parameters()}
    return PortableModel(cfg, 5, 3, LazyTensors.from_dict(tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "positions, bias", [("learned", False), ("learned", True), ("sincos", False), ("sincos", True)]
)
def test_there_and_back(tmp_path, positions, bias, dtype):
    ours = model(positions, bias)
    table, path = rules(ours.cfg), tmp_path / "theirs.safetensors"

    tensor_files.write_safetensors(path, export_tensors(table, ours.tensors), dtype)
    write_terms(tmp_path, ours, table)
    cfg, tensors = import_with_positions(
        tmp_path, PLAIN, rules, "table", tensor_files.read_tensors(path), "here"
    )

    assert (tmp_path / TERMS_FILE).exists() == bias
    unbiased = replace(PLAIN, vision=replace(PLAIN.vision, positions=positions))
    assert cfg == (ours.cfg if bias else unbiased)
    assert tensors.keys() == ours.tensors.keys()
    for name, tensor in ours.tensors.items():
        # kept as they were, whatever the rest is rounded to
        is_exact = bias and name in ("vision.positions", "vision.patch.bias")
        assert torch.equal(tensors[name], tensor if is_exact else tensor.to(dtype)), name


def test_the_table_is_what_the_tower_adds(tmp_path):
    """A tower with sin-cos positions and a bias, and one with the table it becomes, see the
    same.
    """
    ours = model("sincos", True)
    path = tmp_path / "theirs.safetensors"
    tensor_files.write_safetensors(path, export_tensors(rules(ours.cfg), ours.tensors))

    cfg, tensors = import_with_positions(
        tmp_path, PLAIN, rules, "table", tensor_files.read_tensors(path), "here"
    )

    assert cfg == PLAIN
    folded = sincos_table(PLAIN)[1:] + ours.tensors["vision.patch.bias"]
    assert torch.equal(tensors["vision.positions"][1:], folded)
    patches, places = torch.randn(2, 9, 3 * 32 * 32), torch.arange(9).expand(2, 9)
    with torch.no_grad():
        a = PortableModel(ours.cfg, 5, 3, ours.tensors).towers().vision(patches, places)
        b = PortableModel(cfg, 5, 3, tensors).towers().vision(patches, places)
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_tuned_elsewhere_the_table_counts(tmp_path):
    """The tensors beside no longer add up to it; nor do those of another model's shape."""
    ours = model("sincos", True)
    table = rules(ours.cfg)
    tuned = {name: tensor.clone() for name, tensor in export_tensors(table, ours.tensors).items()}
    write_terms(tmp_path, ours, table)
    tuned["table"][3, 5] += 1e-3
    foreign = LazyTensors.from_dict(tuned)

    cfg, tensors = import_with_positions(tmp_path, PLAIN, rules, "table", foreign, "here")

    assert cfg == PLAIN
    assert torch.equal(tensors["vision.positions"], tuned["table"])

    about = tensor_files.read_metadata(tmp_path / TERMS_FILE)
    short = LazyTensors.from_dict({"vision.patch.bias": torch.zeros(7)})
    tensor_files.write_safetensors(tmp_path / TERMS_FILE, short, about=about)
    assert import_with_positions(tmp_path, PLAIN, rules, "table", foreign, "here")[0] == PLAIN


def test_a_table_that_is_missing_or_of_another_grid_is_named(tmp_path):
    tensors = dict(export_tensors(rules(PLAIN), model("learned", False).tensors))
    without = LazyTensors.from_dict({name: t for name, t in tensors.items() if name != "table"})
    larger = LazyTensors.from_dict(tensors | {"table": torch.zeros(50, 128)})

    with pytest.raises(ValueError, match="here: table is missing"):
        import_with_positions(tmp_path, PLAIN, rules, "table", without, "here")

    cfg, ours = import_with_positions(tmp_path, PLAIN, rules, "table", larger, "here")
    with pytest.raises(
        ValueError, match=r"vision.positions is \(50, 128\); its architecture makes it \(10, 128\)"
    ):
        PortableModel(cfg, 5, 3, ours)
