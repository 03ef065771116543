"""How evaluation images become square goes along with a model, or a line tells that it does not.

bash run/test.sh tests/model/convert/test_convert_crops.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glimpse.data import transforms
from glimpse.data.transforms import center_view
from glimpse.model import portable
from glimpse.model.convert import FORMATS, flip_jax, hf, open_clip, timm
from glimpse.model.convert.common import read_crop
from glimpse.model.lazy_tensors import LazyTensors
from glimpse.model.portable import EVAL_CROPS, ModelInfo, PortableModel
from glimpse.model.towers import ModelConfig, Towers
from glimpse.tests.model.convert.test_convert_hf import CLIP, made
from glimpse.tests.model.convert.test_convert_open_clip import FLAVOURS
from glimpse.tests.model.convert.test_convert_open_clip import made as pair

WHOSE = {"open_clip": "open_clip", "hf": "HF's image processor", "timm": "timm", "megatron": ""}
CONFIGS = {"open_clip": "open_clip_config.json", "hf": hf.PREPROCESSOR, "timm": timm.CONFIG}


def test_models_and_images_are_prepared_in_the_same_words():
    """model/ may not import data/."""
    assert (EVAL_CROPS, portable.INTERPOLATIONS) == (transforms.CROPS, transforms.INTERPOLATIONS)


@pytest.mark.parametrize("crop", EVAL_CROPS)
@pytest.mark.parametrize("kind", WHOSE)
def test_out_and_back(kind, crop, tmp_path):
    model, folder = made(CLIP, crop=crop), tmp_path / "out"

    notes = FORMATS[kind].save(model, folder) or []

    assert FORMATS[kind].load(folder).about.crop == crop
    notes = [note for note in notes if "eval_crop" in note]
    differs = kind in CONFIGS and crop == "square"
    assert len(notes) == differs
    for note in notes:
        beginning = f"eval_crop square: {WHOSE[kind]} resizes images before it crops"
        assert note.startswith(beginning)
    if differs:
        FORMATS[kind].reference_model(folder)  # its library passes over what is for us
        file = folder / CONFIGS[kind]
        tree = json.loads(file.read_text())
        tree["glimpse"]["eval_crop"] = "round"
        file.write_text(json.dumps(tree))
        with pytest.raises(
            ValueError,
            match=f"{file}: glimpse.eval_crop: 'round' is unknown; use resize_crop, square, squash",
        ):
            FORMATS[kind].load(folder)


def prepared(kind: str, folder: Path) -> Callable:
    """Return the library's preparation of pictures as the folder says: (3, H, W), as levels."""
    mean = torch.tensor(CLIP.vision.mean)[:, None, None]
    std = torch.tensor(CLIP.vision.std)[:, None, None]
    if kind == "hf":
        processor = pytest.importorskip("transformers").AutoImageProcessor.from_pretrained(folder)

        def transform(image: Image.Image) -> torch.Tensor:
            return processor(image, return_tensors="pt")["pixel_values"][0]

    elif kind == "timm":
        data = pytest.importorskip("timm").data
        config = json.loads((folder / timm.CONFIG).read_text())["pretrained_cfg"]
        transform = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config))
    else:
        library = pytest.importorskip("open_clip")
        _, _, transform = library.create_model_and_transforms(f"local-dir:{folder}")
    return lambda image: (transform(image) * std + mean) * 255


@pytest.mark.parametrize("crop", ["resize_crop", "squash"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_library_prepares_pictures_so(kind, crop, tmp_path):
    """As we do, but for another kernel's rounding."""
    y, x = np.mgrid[:150, :240] / 30
    columns = 60 * np.sin(x * 3)[..., None] * [1, 0.5, -1]
    rows = 40 * np.cos(y * 5)[..., None]
    out = BytesIO()
    Image.fromarray((128 + columns + rows).astype(np.uint8)).save(out, "PNG")
    FORMATS[kind].save(made(CLIP, crop=crop), tmp_path / "out")

    reference = prepared(kind, tmp_path / "out")(Image.open(out))
    ours = torch.from_numpy(center_view(out.getvalue(), CLIP.image_size, crop)).permute(2, 0, 1)

    assert reference.shape == ours.shape
    differences = (reference - ours).abs()
    assert differences.max() < 2.01
    assert differences.mean() < 0.3


def test_transformers_keeps_it(tmp_path):
    """When it saves its image processor anew."""
    transformers = pytest.importorskip("transformers")
    hf.save(made(CLIP, crop="square"), tmp_path / "out")
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").save_pretrained(
        tmp_path / "again"
    )
    assert (
        read_crop(json.loads((tmp_path / "again" / hf.PREPROCESSOR).read_text()), tmp_path)
        == "square"
    )


def test_flips_release_knows_the_square_alone(tmp_path):
    cfg = ModelConfig("nano/8", image_size=16)
    parameters = Towers(cfg, 9, 4).named_parameters()
    tensors = LazyTensors.from_dict({name: parameter.detach() for name, parameter in parameters})
    model = PortableModel(cfg, 9, 4, tensors, ModelInfo(pad_text=True, crop="square"))

    assert flip_jax.save(model, tmp_path / "same") == []
    (note,) = flip_jax.save(replace(model, about=ModelInfo(pad_text=True)), tmp_path / "other")
    assert note.startswith("eval_crop resize_crop: FLIP's code crops images before it resizes them")
    assert flip_jax.load(tmp_path / "other").about.crop == "square"


def test_timms_other_modes_are_told(tmp_path):
    timm.save(made(CLIP), tmp_path / "out")
    file = tmp_path / "out" / timm.CONFIG
    tree = json.loads(file.read_text())
    tree["pretrained_cfg"]["crop_mode"] = "border"
    file.write_text(json.dumps(tree))

    notes = timm.load(tmp_path / "out").about.source["notes"]

    assert notes.startswith("crop_mode border: its images are made square otherwise")


def test_the_command_tells_it(tmp_path, convert):
    """For a model of Glimpse's own that is evaluated on central squares."""
    model = pair(*FLAVOURS["CLIP"])
    model = replace(model, about=replace(model.about, crop="square"))
    portable.save_model(model, tmp_path / "in", torch.bfloat16)

    code, out, complaint = convert("open_clip", tmp_path / "in", tmp_path / "out")

    assert code == 0, complaint
    assert "  eval_crop square: open_clip resizes" in out, complaint
    assert open_clip.load(tmp_path / "out").about.crop == "square"
