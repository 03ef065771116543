"""A model as conversions pass it on: its architecture, its vocabulary and its weights under
Glimpse's names.

    FOLDER/config.json          what it is, in the keys of a run's config (so it may be one's
                                `base:`), and where it comes from
    FOLDER/model.safetensors    the weights, under the names that model.towers.Towers gives them
    FOLDER/tokenizer.*          the vocabulary, where no package brings it

This is Glimpse's own format: what `run/convert.py glimpse` writes, and what evaluations, `init:`
and run/embed.py read
(run/train/load_model.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from glimpse.model import tensor_files
from glimpse.model.lazy_tensors import Tensors, check_shapes
from glimpse.model.towers import ModelConfig, Towers

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Of evaluation images, as eval_crop names them: resized, then cropped; the other way round; resized
# alone, distorted.
CROPS = ("resize_crop", "square", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclass(frozen=True)
class About:
    """What goes with the weights."""

    tokenizer: str = ""  # as data.tokenizer names it
    fingerprint: str = ""  # of its vocabulary
    eot: int | None = None  # the id that ends a caption, where there is one
    pad_text: bool = False  # captions are filled to the context, and the padding is attended to
    crop: str = CROPS[0]  # how an image becomes square
    interpolation: str = "bicubic"
    # where it comes from: path, format, weights, step, samples, ...
    source: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation {self.interpolation!r}: images are resized by"
                f" {' or '.join(INTERPOLATIONS)} here"
            )


@dataclass(frozen=True)
class Portable:
    """A pair of towers, or a vision tower alone (vocab 0), whose tensors are read when they are
    asked for.
    """

    cfg: ModelConfig
    vocab: int  # token ids; 0: there is no text tower
    context: int  # tokens of a caption at most; 0 likewise
    tensors: Tensors  # by the names of Towers: vision.patch.weight, ...
    about: About = field(default_factory=lambda: About())

    def __post_init__(self):
        check_shapes(self.tensors, self.shapes(), self.about.source.get("path", "the model"))

    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every tensor that its architecture has."""
        return {
            name: p.shape
            for name, p in self.skeleton().named_parameters()
            if self.vocab or vision(name)
        }

    def skeleton(self) -> nn.Module:
        """The towers without memory; of a vision tower alone, with one word and one place for a
        token.
        """
        with torch.device("meta"):
            return Towers(self.cfg, self.vocab or 1, self.context or 1)

    def towers(self) -> Towers:
        """The towers in fp32, whole and in memory, for looking at."""
        made = Towers(
            replace(self.cfg, checkpoint_activations=False), self.vocab or 1, self.context or 1
        )
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name in self.tensors:
                    parameter.copy_(self.tensors[name])
        return made.eval()


def vision(name: str) -> bool:
    """Is it a tensor of the vision tower proper?  The projection belongs to the pair."""
    return name.startswith("vision.")


def vision_only(tensors: Tensors) -> Tensors:
    return tensors.renamed({name: name for name in tensors if vision(name)})


def save(model: Portable, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the folder, without the vocabulary, which is the caller's."""
    folder.mkdir(parents=True)
    tensor_files.write(folder / WEIGHTS, model.tensors, dtype)
    about = model.about
    tree = dict(
        provenance=dict(
            format="glimpse",
            vocab=model.vocab,
            fingerprint=about.fingerprint,
            eot=about.eot,
            source=about.source,
        ),
        model=asdict(model.cfg),
        views={"image": {"interpolation": about.interpolation}},
        eval_crop=about.crop,
    )
    if model.vocab:
        tree["data"] = dict(
            context=model.context, tokenizer=about.tokenizer, pad_text=about.pad_text
        )
    (folder / CONFIG).write_text(json.dumps(tree, indent=1) + "\n")


def is_one(folder: Path) -> bool:
    try:
        return json.loads((folder / CONFIG).read_text())["provenance"]["format"] == "glimpse"
    except (OSError, ValueError, KeyError, TypeError):
        return False
