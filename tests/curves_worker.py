"""Launched by test_curves.py on 1, 2 or 4 ranks: many short trainings in one process group, their losses into a JSON file.

    deepspeed --num_accelerators 2 tests/curves_worker.py DATA OUT.json
"""
import json
import sys
import tempfile
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.batches import Batches, Reader  # noqa: E402
from data.shards import Shards  # noqa: E402
from run.lib import config, engine, ranks  # noqa: E402
from tests.tiny import TINY  # noqa: E402

MASKS = {"clip": "none", "flip": "random(0.5)", "glip": "gaussian(0.5)"}
CLIP_FLAVOUR = ["model.init=clip", "model.vision.positions=learned", "model.vision.pool=cls", "model.vision.pre_norm=true",
                "model.text.causal=true", "model.text.pool=eot", "optim.clip=1.0"]
FLAVOURS = {"clip": CLIP_FLAVOUR, "flip": [], "glip": CLIP_FLAVOUR}


def curve(data: str, name: str, stage: int, *more: str, bf16: bool = False) -> list[float]:
    """Twenty losses of a tiny run, at a rate where rounding does not grow: Adam's first steps follow signs of the smallest gradients."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10000}, "bf16": {"enabled": bf16}}, file)
        file.flush()
        cfg = config.load("run/configs/quickstart.yaml", [
            f"data.train={data}/train", f"data.tokenizer=sentencepiece({data}/tokenizer.model)", *TINY, f"deepspeed={file.name}",
            f"views.image.mask={MASKS[name]}", "optim.lr=5e-4", *FLAVOURS[name], *more])
        reader = Reader(cfg.data, cfg.views, image_size=cfg.model.image_size, patch=cfg.model.patch, seed=cfg.seed)
        batches = Batches(reader, Shards(cfg.data.train), batch=cfg.batch, accumulate=cfg.accumulate,
                          rank=ranks.rank(), world=ranks.world())
        trainer = engine.Engine(cfg, reader.tokenizer.vocab_size)
        stream = batches.stream(range(0, cfg.samples, cfg.batch), pin=False)
        losses = [float(trainer.step(parts, cfg.optim.rate(trainer.samples, cfg.batch, cfg.samples))[0]) for parts in stream]
        trainer.ds.destroy()
        return losses


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    ranks.start()
    found = {f"{name} stage {stage}": curve(data, name, stage) for name in MASKS for stage in range(4)}
    found["flip stage 3 accumulate 4"] = curve(data, "flip", 3, "accumulate=4")
    found["clip stage 1 accumulate 2"] = curve(data, "clip", 1, "accumulate=2")
    found["flip stage 3 checkpointed"] = curve(data, "flip", 3, "model.checkpoint_activations=true")
    found["flip stage 3 bf16"] = curve(data, "flip", 3, bf16=True)
    if ranks.rank() == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    ranks.run_script(main)
