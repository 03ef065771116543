"""Launched by test_curves.py on 1, 2 or 4 ranks: many short trainings in one process group.

The losses are written to a JSON file.

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
from glimpse.tests.helpers.tiny import RUN_EVERYTHING, TINY

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
    "views.augmented={count: 2, crop: [0.3, 1.0], jitter: [0.4, 0.4, 0.4, 0.1], grey: 0.2,"
    " blur: 0.1}"
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
        "options={block: 16, simclr: 1.0, byol: 2.0, simsiam: 0.5, hidden: 64, out: 32,"
        " momentum: [0.9, 1.0]}",
    ],
}


def tiny_config(
    data: str, name: str, stage: int, *more: str, bf16: bool = False
) -> config.RunConfig:
    """Return the config of a tiny run whose losses do not depend on rounding errors.

    Adam divides a gradient by its own magnitude, so a parameter whose gradient is only rounding
    error, e.g. a bias before batch norm, would move by the full learning rate. A large eps prevents
    that. more: config overrides.
    """
    ds_config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10000},
        "bf16": {"enabled": bf16},
    }
    path = Path(tempfile.mkdtemp()) / "deepspeed.json"
    path.write_text(json.dumps(ds_config))
    return config.load(
        "run/configs/quickstart.yaml",
        [
            f"data.train={data}/train",
            f"data.tokenizer=sentencepiece({data}/tokenizer.model)",
            *TINY,
            f"deepspeed={path}",
            f"views.image.mask={MASKS.get(name, 'none')}",
            "optim.lr=5e-4",
            "optim.eps=1e-5",
            *FLAVOURS.get(name, CLIP_FLAVOUR),
            *METHODS.get(name, []),
            *more,
        ],
    )


def build_trainer(cfg: config.RunConfig, **engine_options) -> tuple[engine.Engine, Batches]:
    """Return the engine of a run, and this rank's batches."""
    reader = config.build_reader(cfg)
    trainer = engine.Engine(cfg, reader.tokenizer.vocab_size, **engine_options)
    batches = Batches(
        reader,
        Shards(cfg.data.train),
        batch=cfg.batch,
        accumulate=cfg.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return trainer, batches


def train_until(
    cfg: config.RunConfig, trainer: engine.Engine, batches: Batches, samples: int
) -> Iterator[float]:
    """Train until `samples` samples have been seen, and yield the loss of each step."""
    for micro_batches in batches.iterate(
        range(trainer.samples, samples, cfg.batch), pin_memory=False
    ):
        lr = cfg.optim.lr_at(trainer.samples, cfg.batch, cfg.samples)
        loss, *_ = trainer.step(micro_batches, lr)
        yield float(loss)


def train_curve(*case, steps: int = 20, **options) -> list[float]:
    """Return the losses of the first steps of a run; the arguments are those of tiny_config()."""
    cfg = tiny_config(*case, **options)
    trainer, batches = build_trainer(cfg)
    losses = list(train_until(cfg, trainer, batches, steps * cfg.batch))
    trainer.ds.destroy()
    return losses


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    world = distributed.world_size()
    short = 20 if RUN_EVERYTHING else 6  # steps; slow when ranks share cores
    curves = {}

    # CLIP, FLIP and GLIP at every stage. All 20 steps of flip, and of the other references.
    for name in MASKS:
        for stage in range(4):
            full = name == "flip" or (world == 1 and stage == 0)
            curves[f"{name} stage {stage}"] = train_curve(
                data, name, stage, steps=20 if full else short
            )

    # Accumulation, recomputation and bf16 of flip and clip; the other methods.
    if world < 4:
        checkpointed = "model.checkpoint_activations=true"
        curves["flip stage 3 accumulate 4"] = train_curve(
            data, "flip", 3, "accumulate=4", steps=short
        )
        curves["clip stage 1 accumulate 2"] = train_curve(
            data, "clip", 1, "accumulate=2", steps=short
        )
        curves["flip stage 3 checkpointed"] = train_curve(
            data, "flip", 3, checkpointed, steps=short
        )
        bf16_steps = 20 if world == 1 else short
        curves["flip stage 3 bf16"] = train_curve(data, "flip", 3, bf16=True, steps=bf16_steps)
        for stage in (0, 3)[world - 1 :]:
            steps = short if world == 1 and stage == 3 else 20
            for name in METHODS:
                curves[f"{name} stage {stage}"] = train_curve(data, name, stage, steps=steps)

    # Accumulation, recomputation and bf16 of the other methods.
    if world == 2:
        for name in METHODS:
            overrides = []
            if name == "aclip":
                overrides = ["options.as_released=true", "options.average_text=true"]
            curves[f"{name} accumulated"] = train_curve(
                data, name, 3, "accumulate=2", *overrides, steps=6
            )
            if name != "slip":
                curves[f"{name} checkpointed"] = train_curve(data, name, 3, checkpointed, steps=6)
        for name in ("maskclip", "aclip"):
            curves[f"{name} bf16"] = train_curve(data, name, 3, bf16=True, steps=12)

    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(curves))


if __name__ == "__main__":
    distributed.run_script(main)
