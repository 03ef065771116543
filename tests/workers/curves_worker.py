"""Launched by test_curves.py on 1, 2 or 4 ranks: many short trainings in one process group, their
losses into a JSON file.

    deepspeed --num_accelerators 2 tests/workers/curves_worker.py DATA OUT.json
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from glimpse.data.loader import Batches
from glimpse.data.shards import Shards
from glimpse.run.lib import config, distributed
from glimpse.run.train import engine
from glimpse.tests.helpers.tiny import TINY, WHOLE

MASKS = {"clip": "none", "flip": "random(0.5)", "glip": "gaussian(0.5)"}
CLIP_FLAVOUR = [
    "model.init=clip",
    "model.vision.positions=learned",
    "model.vision.pool=cls",
    "model.vision.pre_norm=true",
    "model.text.causal=true",
    "model.text.pool=eot",
    "optim.clip=1.0",
]
FLAVOURS = {"clip": CLIP_FLAVOUR, "flip": [], "glip": CLIP_FLAVOUR}
AUGMENTED = (
    "views.augmented={count: 2, crop: [0.3, 1.0], jitter: [0.4, 0.4, 0.4, 0.1], grey: 0.2, blur:"
    " 0.1}"
)
VIEWS = [
    "views.image=null",
    "views.view={count: 2, jitter: [0.4, 0.4, 0.2, 0.1]}",
    "views.teacher={encloses: [view]}",
]
METHODS = {
    "slip": ["method=slip", "views.image.mask=none", AUGMENTED, "options={hidden: 64, out: 32}"],
    "mae": [
        "method=mae",
        "views.image.mask=random(0.75)",
        "options={width: 64, depth: 1, heads: 2}",
    ],
    "maskclip": [
        "method=maskclip",
        "views.image.mask=random(0.75)",
        "model.vision.pool=mean",
        "options={momentum: [0.9, 0.99]}",
    ],
    "aclip": [
        "method=aclip",
        *VIEWS,
        "model.vision.freeze_patch=true",
        (
            "options={block: 16, simclr: 1.0, byol: 2.0, simsiam: 0.5, hidden: 64, out: 32,"
            " momentum: [0.9, 1.0]}"
        ),
    ],
}


def settings(data: str, name: str, stage: int, *more: str, bf16: bool = False) -> config.Run:
    """The config of a tiny run, at a rate and an eps where rounding does not grow.

    Adam divides a gradient by its own size: one that is nothing but rounding (of a bias before
    batch norm, say) moves by the whole rate.
    """
    spent = Path(tempfile.mkdtemp()) / "deepspeed.json"
    spent.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10000},
                "bf16": {"enabled": bf16},
            }
        )
    )
    return config.load(
        "run/configs/quickstart.yaml",
        [
            f"data.train={data}/train",
            f"data.tokenizer=sentencepiece({data}/tokenizer.model)",
            *TINY,
            f"deepspeed={spent}",
            f"views.image.mask={MASKS.get(name, 'none')}",
            "optim.lr=5e-4",
            "optim.eps=1e-5",
            *FLAVOURS.get(name, CLIP_FLAVOUR),
            *METHODS.get(name, []),
            *more,
        ],
    )


def start(cfg: config.Run, **how) -> tuple[engine.Engine, Batches]:
    """The engine of a run, and this rank's batches."""
    reader = config.reader(cfg)
    share = dict(
        batch=cfg.batch,
        accumulate=cfg.accumulate,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    return engine.Engine(cfg, reader.tokenizer.vocab_size, **how), Batches(
        reader, Shards(cfg.data.train), **share
    )


def steps(cfg: config.Run, trainer: engine.Engine, batches: Batches, until: int) -> Iterator[float]:
    """Train on, a loss a step, until so many samples are seen."""
    for parts in batches.stream(range(trainer.samples, until, cfg.batch), pin=False):
        yield float(trainer.step(parts, cfg.optim.rate(trainer.samples, cfg.batch, cfg.samples))[0])


def curve(*case, only: int = 20, **how) -> list[float]:
    """The losses of twenty steps, or of only the first so many."""
    cfg = settings(*case, **how)
    trainer, batches = start(cfg)
    losses = list(steps(cfg, trainer, batches, only * cfg.batch))
    trainer.ds.destroy()
    return losses


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    one = distributed.world() == 1
    short = 20 if WHOLE else 6  # ranks that share two cores take their time
    found = {
        f"{name} stage {stage}": curve(
            data, name, stage, only=20 if name == "flip" or one and stage == 0 else short
        )
        for name in MASKS
        for stage in range(4)
    }
    if distributed.world() < 4:
        found["flip stage 3 accumulate 4"] = curve(data, "flip", 3, "accumulate=4", only=short)
        found["clip stage 1 accumulate 2"] = curve(data, "clip", 1, "accumulate=2", only=short)
        found["flip stage 3 checkpointed"] = curve(
            data, "flip", 3, "model.checkpoint_activations=true", only=short
        )
        found["flip stage 3 bf16"] = curve(data, "flip", 3, bf16=True, only=20 if one else short)
        for stage in (0, 3)[distributed.world() - 1 :]:
            found |= {
                f"{name} stage {stage}": curve(
                    data, name, stage, only=short if one and stage else 20
                )
                for name in METHODS
            }
    if distributed.world() == 2:
        released = ["options.as_released=true", "options.average_text=true"]
        for name in METHODS:
            found[f"{name} accumulated"] = curve(
                data, name, 3, "accumulate=2", *released * (name == "aclip"), only=6
            )
            if name != "slip":
                found[f"{name} checkpointed"] = curve(
                    data, name, 3, "model.checkpoint_activations=true", only=6
                )
        found |= {
            f"{name} bf16": curve(data, name, 3, bf16=True, only=12)
            for name in ("maskclip", "aclip")
        }
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    distributed.run_script(main)
