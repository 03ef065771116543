"""An architecture's numbers become a row of the table of sizes where one fits, else a size of their
own that means the same.
"""

import numpy as np
import pytest
import torch

from glimpse.model.convert.positions import is_sincos, sincos_table
from glimpse.model.convert.sizes import mlp_ratio, size_fields
from glimpse.model.layers import mlp_width
from glimpse.model.towers import ModelConfig, Size


def test_rows_and_others():
    assert size_fields(16, width=768, depth=12, heads=12, mlp=4.0) == {"size": "B/16"}
    assert size_fields(14, width=1024, depth=24, text_width=512) == {"size": "L512/14"}
    # whose heads are 80 wide
    assert size_fields(14, width=1280, depth=32, heads=None) == {"size": "H/14"}
    custom = Size(384, 12, 12, 384, 12, 6, 384)
    # SLIP's S, all columns but one
    assert size_fields(16, width=384, depth=12, heads=12) == {"size": "custom/16", "custom": custom}
    assert size_fields(7, width=768, depth=12)["size"] == "custom/7"
    size = size_fields(14, width=1408, depth=40, mlp=mlp_ratio(1408, 6144))
    assert ModelConfig(**size, image_size=28).shape.heads == 22


@pytest.mark.parametrize(
    "width, inside", [(1408, 6144), (1664, 8192), (1152, 4304), (49, 147), (3, 10)]
)
def test_the_ratio_gives_the_width(width, inside):
    assert mlp_width(width, mlp_ratio(width, inside)) == inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_computed_elsewhere_are_known(dtype):
    """As FLIP computes them: all in fp32."""
    cfg = ModelConfig("L/16")
    exponents = np.arange(256, dtype=np.float32) / np.float32(256)
    omega = (1 / np.float32(10_000) ** exponents).astype(np.float32)
    steps = np.arange(14, dtype=np.float32)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    waves = [wave(axis) for axis in angles for wave in (np.sin, np.cos)]
    table = torch.from_numpy(np.concatenate(waves, axis=1))
    table = torch.cat([torch.zeros(1, 1024), table])

    assert table.dtype == torch.float32
    assert not torch.equal(table, sincos_table(cfg))
    assert is_sincos(table.to(dtype), cfg)
    table[100, 1000] += 0.02
    assert not is_sincos(table.to(dtype), cfg)
