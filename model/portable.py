"""The form in which conversions pass models on: architecture, vocabulary, and weights under
Glimpse's names.

    FOLDER/config.json          the architecture, in the keys of a run's config (so it can be one's
                                `base:`), and the source
    FOLDER/model.safetensors    the weights, under the names that model.towers.Towers gives them
    FOLDER/tokenizer.*          the vocabulary, unless a package has it

This is Glimpse's own format: `run/convert.py glimpse` writes it; evaluations, `init:` and
run/embed.py read it (run/train/load_model.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from glimpse.model import tensor_files
from glimpse.model.lazy_tensors import LazyTensors, check_shapes
from glimpse.model.towers import ModelConfig, Towers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Values of eval_crop, how evaluation images become square. resize_crop: resized, then cropped;
# square: cropped, then resized; squash: only resized, which distorts them.
EVAL_CROPS = ("resize_crop", "square", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class ModelInfo:
    """Settings that go with the weights."""

    tokenizer: str = ""  # as data.tokenizer names it
    fingerprint: str = ""  # of its vocabulary
    eot: int | None = None  # the id that ends a caption, where there is one
    pad_text: bool = False  # captions are filled to the context, and the padding is attended to
    crop: str = EVAL_CROPS[0]  # how an image becomes square
    interpolation: str = "bicubic"
    # path, format, weights, step, samples, ...
    source: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation {self.interpolation!r}: images are resized by"
                f" {' or '.join(INTERPOLATIONS)} here"
            )


@dataclass(frozen=True)
class PortableModel:
    """A pair of towers, or a vision tower alone (vocab 0), whose tensors are read on demand."""

    cfg: ModelConfig
    vocab: int  # number of token ids; 0: there is no text tower
    context: int  # the most tokens of a caption; 0 likewise
    tensors: LazyTensors  # by the names of Towers: vision.patch.weight, ...
    about: ModelInfo = field(default_factory=lambda: ModelInfo())

    def __post_init__(self) -> None:
        check_shapes(self.tensors, self.shapes(), self.about.source.get("path", "the model"))

    def shapes(self) -> Mapping[str, torch.Size]:
        """Return {name: shape} of every tensor of the architecture."""
        shapes = {}
        for name, parameter in self.skeleton().named_parameters():
            if self.vocab or is_vision_weight(name):
                shapes[name] = parameter.shape
        return shapes

    def skeleton(self) -> nn.Module:
        """Return the towers on the meta device.

        A vision tower alone gets a text tower with one word and one position.
        """
        with torch.device("meta"):
            return Towers(self.cfg, self.vocab or 1, self.context or 1)

    def towers(self) -> Towers:
        """Return the towers in fp32, with all weights in memory, in eval mode."""
        cfg = replace(self.cfg, checkpoint_activations=False)
        towers = Towers(cfg, self.vocab or 1, self.context or 1)
        with torch.no_grad():
            for name, parameter in towers.named_parameters():
                if name in self.tensors:
                    parameter.copy_(self.tensors[name])
        return towers.eval()


def is_vision_weight(name: str) -> bool:
    """Return True for a tensor of the vision tower.  The projection belongs to the pair."""
    return name.startswith("vision.")


def select_vision_weights(tensors: LazyTensors) -> LazyTensors:
    return tensors.rename({name: name for name in tensors if is_vision_weight(name)})


def save_model(model: PortableModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the folder without the vocabulary, which the caller writes."""
    folder.mkdir(parents=True)
    tensor_files.write_safetensors(folder / WEIGHTS_FILE, model.tensors, dtype)
    about = model.about
    provenance = dict(
        format="glimpse",
        vocab=model.vocab,
        fingerprint=about.fingerprint,
        eot=about.eot,
        source=about.source,
    )
    tree = dict(
        provenance=provenance,
        model=asdict(model.cfg),
        views={"image": {"interpolation": about.interpolation}},
        eval_crop=about.crop,
    )
    if model.vocab:
        tree["data"] = dict(
            context=model.context, tokenizer=about.tokenizer, pad_text=about.pad_text
        )
    (folder / CONFIG_FILE).write_text(json.dumps(tree, indent=1) + "\n")


def is_glimpse_folder(folder: Path) -> bool:
    """Return True for a folder in Glimpse's own format."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text())["provenance"]["format"] == "glimpse"
    except (OSError, ValueError, KeyError, TypeError):
        return False
