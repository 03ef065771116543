"""Where what the shipped configs train can go: docs/converting.md's table is what the formats say.

bash run/test.sh tests/model/convert/test_convert_shipped.py
"""

import re
from pathlib import Path

import pytest
import torch

from glimpse.model.convert import flip_jax, hf, megatron, open_clip, timm
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import ModelInfo, PortableModel
from glimpse.model.towers import Towers
from glimpse.run.lib import config
from glimpse.tests.helpers.tiny import ROOT


def check_timm(model: PortableModel) -> None:
    timm.timm_architecture(model.cfg)


def check_megatron(model: PortableModel) -> None:
    megatron.check_split(model.cfg, True, 1, "local")


def check_flip_jax(model: PortableModel) -> None:
    flip_jax.check_settings(model.cfg, True)


SAYS = {  # each raises ValueError if its format cannot express the model
    "open_clip": open_clip.make_config,
    "hf": hf.check_settings,
    "timm": check_timm,
    "megatron": check_megatron,
    "flip_jax": check_flip_jax,
}


def told() -> dict[str, dict[str, bool]]:
    """Return the table as {config: {format: does it go there}}."""
    page = (ROOT / "docs/converting.md").read_text()
    table = page.split("\n| configs | ")[1].split("\n\n")[0].splitlines()
    header, _, *lines = table
    formats = [cell.strip() for cell in header.strip("|").split("|")]
    rows = {}
    for line in lines:
        names, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        answers = [{"yes": True, "no": False}[cell] for cell in cells]
        for name in re.findall(r"`(\w+)`", names):
            rows[name] = dict(zip(formats, answers, strict=True))
    return rows


def test_all_are_in_the_table():
    assert told().keys() == {file.stem for file in Path(ROOT / "run/configs").glob("*.yaml")}
    assert all(says.keys() == SAYS.keys() for says in told().values())


@pytest.mark.parametrize("name", told())
def test_the_table_is_what_the_formats_say(name):
    cfg = config.load(ROOT / f"run/configs/{name}.yaml")
    with torch.device("meta"):
        towers = Towers(cfg.model, 1000, cfg.data.context)
    about = ModelInfo(
        tokenizer=cfg.data.tokenizer, eot=999, pad_text=cfg.data.pad_text, crop=cfg.eval_crop
    )
    tensors = LazyTensors.from_dict(dict(towers.named_parameters()))
    model = PortableModel(cfg.model, 1000, cfg.data.context, tensors, about)

    for format_name, goes in told()[name].items():
        try:
            SAYS[format_name](model)
            can = True
        except ValueError:
            can = False
        assert can == goes, format_name
