"""Where what the shipped configs train can go: docs/converting.md's table is what the formats say.

bash run/test.sh tests/model/convert/test_convert_shipped.py
"""

import re
from pathlib import Path

import pytest
import torch

from glimpse.model.convert import flip_jax, hf, megatron, open_clip, timm
from glimpse.model.lazy_tensors import Tensors
from glimpse.model.portable import About, Portable
from glimpse.model.towers import Towers
from glimpse.run.lib import config
from glimpse.tests.helpers.tiny import ROOT

SAYS = {  # each raises ValueError where its format cannot be the model
    "open_clip": open_clip.config_out,
    "hf": hf.check,
    "timm": lambda model: timm.described(model.cfg),
    "megatron": lambda model: megatron.check(model.cfg, True, 1, "local"),
    "flip_jax": lambda model: flip_jax.check_flavour(model.cfg, True),
}


def told() -> dict[str, dict[str, bool]]:
    """{config: {format: does it go there}} of the table."""
    table = (
        (ROOT / "docs/converting.md")
        .read_text()
        .split("\n| configs | ")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    formats = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {
        name: {
            format: {"yes": True, "no": False}[cell]
            for format, cell in zip(formats, cells, strict=True)
        }
        for names, *cells in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_all_are_in_the_table():
    assert told().keys() == {file.stem for file in Path(ROOT / "run/configs").glob("*.yaml")}
    assert all(says.keys() == SAYS.keys() for says in told().values())


@pytest.mark.parametrize("name", told())
def test_the_table_is_what_the_formats_say(name):
    cfg = config.load(ROOT / f"run/configs/{name}.yaml")
    with torch.device("meta"):
        towers = Towers(cfg.model, 1000, cfg.data.context)
    model = Portable(
        cfg.model,
        1000,
        cfg.data.context,
        Tensors.held(dict(towers.named_parameters())),
        About(
            tokenizer=cfg.data.tokenizer, eot=999, pad_text=cfg.data.pad_text, crop=cfg.eval_crop
        ),
    )
    for format, goes in told()[name].items():
        try:
            SAYS[format](model)
            can = True
        except ValueError:
            can = False
        assert can == goes, format
