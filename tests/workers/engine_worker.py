"""Launched by test_engine.py on 2 ranks: what only a real engine shows.

Many cases run in one process group; their values go into a JSON file.

    deepspeed --num_accelerators 2 tests/workers/engine_worker.py DATA OUT.json
"""

import json
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from tests/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from glimpse.data.loader import Batches
from glimpse.data.shards import Shards
from glimpse.model.methods import METHODS
from glimpse.model.methods.clip import Clip
from glimpse.run.lib import config, distributed
from glimpse.run.train import checkpoint, engine, load_model, optim, zero_reader
from glimpse.tests.helpers.tiny import TINY

CLIP_FLAVOUR = [
    "model.init=clip",
    "model.vision.positions=learned",
    "model.vision.pool=cls",
    "model.vision.pre_norm=true",
    "model.text.causal=true",
    "model.text.pool=eot",
    "optim.no_decay=[bias, norm, cls, logit_scale]",
]


class Unused(Clip):
    """A layer that no forward enters."""

    def __init__(self, *args):
        super().__init__(*args)
        self.forgotten = torch.nn.Linear(8, 8)


METHODS["unused"] = Unused


class Cases:
    def __init__(self, data: Path):
        self.data = data

    def config(self, stage: int, *more: str, bf16: bool = False):
        tree = {
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
            "bf16": {"enabled": bf16},
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(tree, file)
        return config.load(
            "run/configs/quickstart.yaml",
            [
                f"data.train={self.data}/train",
                f"data.tokenizer=sentencepiece({self.data}/tokenizer.model)",
                *TINY,
                "views.image.mask=random(0.5)",
                "optim.lr=3e-3",
                f"deepspeed={file.name}",
                *more,
            ],
        )

    def trained(self, cfg, steps: int, **how) -> engine.Engine:
        reader = config.build_reader(cfg)
        batches = Batches(
            reader,
            Shards(cfg.data.train),
            batch=cfg.batch,
            rank=distributed.rank(),
            world=distributed.world_size(),
        )
        trainer = engine.Engine(cfg, reader.tokenizer.vocab_size, **how)
        for parts in batches.stream(range(0, steps * cfg.batch, cfg.batch), pin=False):
            loss, *_ = trainer.step(parts, 3e-3)
            self.loss = float(loss)
        self.parts = batches[steps * cfg.batch]
        return trainer

    def guard(self, stage: int) -> str:
        """Return the error of a step with a parameter without a gradient."""
        try:
            self.trained(self.config(stage, "method=unused"), 1)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    def temperature(self, stage: int) -> dict:
        """Return the temperature under bf16 after three steps, and where it is clamped.

        The fp32 copy, the parameter that the forward sees, residual and scale; then the clamp.
        """
        trainer = self.trained(self.config(stage, bf16=True), 3)
        (module,) = trainer.temperatures
        with gather_parameters([module.logit_scale]):
            copy = module.logit_scale.item()
            kind = str(module.logit_scale.dtype)
        master = safe_get_full_fp32_param(module.logit_scale)
        results = dict(
            master=master.item(),
            copy=copy,
            kind=kind,
            residual=float(module.residual),
            scale=self.scale(trainer),
        )
        trainer.ds.destroy()

        hot = self.trained(self.config(stage, bf16=True), 1, load=raise_temperature)
        results["clamped"] = self.scale(hot)
        results["loss"] = self.loss
        hot.ds.destroy()
        return results

    def scale(self, trainer: engine.Engine) -> float:
        part = dict(views=self.parts[0]["views"], text=self.parts[0]["text"])
        with torch.no_grad():
            return float(trainer.ds(distributed.to_device(part))["scale"])

    def groups(self, *flavour: str) -> list[dict]:
        """Return the optimizer's groups of a method built under zero.Init, {name: numel} each."""
        cfg = self.config(3, *flavour)
        with deepspeed.zero.Init(
            config_dict_or_path=engine.build_deepspeed_config(cfg, distributed.world_size())
        ):
            method = METHODS[cfg.method](cfg.model, 320, cfg.data.context, cfg.options)
        names = {id(parameter): name for name, parameter in method.named_parameters()}
        groups = []
        for group in optim.parameter_groups(method, cfg.optim):
            groups.append({names[id(p)]: p.ds_numel for p in group["params"]})
        return groups

    def saved(self, stage: int, bf16: bool, then: int) -> dict:
        """Train, save four times with two kept, and load the last into a new engine.

        The weights are read from the file, too; the new engine has another stage and seed.
        """
        frozen = "model.vision.freeze_patch=true"
        trainer = self.trained(self.config(stage, frozen, bf16=bf16), 2)
        folder = self.data / f"saved-{stage}-{bf16}-{then}" / "checkpoints"
        for _ in range(3):
            checkpoint.save(trainer, folder, dict(identity={}, shards=0), keep=2)
            trainer.step(self.parts, 3e-3)
        path = checkpoint.save(trainer, folder, dict(identity={}, shards=0), keep=2)
        masters = self.weights(trainer)
        trainer.ds.destroy()

        # From the file alone, then by an engine.
        read = {name: value.float() for name, value in zero_reader.read_weights(path).items()}
        other = self.config(then, "seed=7", frozen, bf16=bf16)
        fresh = self.trained(other, 0, load=partial(load_model.load_weights, path=path))
        loaded = self.weights(fresh)

        moments = [0.0]
        for state in fresh.ds.optimizer.optimizer.state.values():
            if "exp_avg" in state and len(state["exp_avg"]):
                moments.append(float(state["exp_avg"].abs().max()))
        in_both = [name for name in masters if name in read]
        results = {}
        results["kept"] = sorted(step.name for step in folder.glob("step-*"))
        results["newest"] = checkpoint.newest_checkpoint(folder.parent).name
        results["missing"] = sorted(masters.keys() - read.keys())
        results["count"] = len(masters)
        # Weights that differ, as read from the file and as loaded.
        results["read"] = [name for name in in_both if not torch.equal(read[name], masters[name])]
        results["loaded"] = [
            name for name in masters if not torch.equal(loaded[name], masters[name])
        ]
        results["moments"] = max(moments)
        results["steps"] = fresh.ds.global_steps
        fresh.step(self.parts, 1e-3)
        fresh.ds.destroy()
        return results

    def weights(self, trainer: engine.Engine) -> dict[str, torch.Tensor]:
        """Return {name: the full fp32 weight}; a frozen one has no fp32 copy."""
        weights = {}
        for name, parameter in trainer.method.named_parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            with gather_parameters([parameter]):
                value = parameter if master is None else master
                weights[name] = value.detach().float().cpu().clone()
        return weights

    def stop(self) -> list[int]:
        """Return the step after which each rank hears of a signal.

        Rank 1 alone gets it, before its third step.
        """
        stop = distributed.StopSignal()
        at = -1
        for step in range(10):
            if step == 2 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.is_requested():
                at = step
                break
        both = torch.zeros(2)
        both[distributed.rank()] = at
        return distributed.all_reduce_sum(both).tolist()


def raise_temperature(method) -> None:
    """Set logit_scale far above ln 100."""
    with engine.full_parameter(method.towers.temperature.logit_scale) as logit_scale:
        logit_scale.fill_(6.0)


def gather_parameters(parameters):
    """Gather parameters inside `with`, where they are sharded."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded)


def main() -> None:
    data, out = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    distributed.start()
    cases = Cases(Path(data))
    results = {}
    for stage in (0, 1, 2, 3):
        results[f"guard {stage}"] = cases.guard(stage)
    for stage in (1, 2, 3):
        results[f"temperature {stage}"] = cases.temperature(stage)
    results["groups flip"] = cases.groups()
    results["groups clip"] = cases.groups(*CLIP_FLAVOUR)
    for stage, bf16, then in (
        (0, False, 3),
        (1, False, 3),
        (3, False, 1),
        (3, False, 3),
        (1, True, 3),
        (3, True, 1),
        (3, True, 2),
        (3, True, 3),
    ):
        results[f"saved {stage} {bf16} {then}"] = cases.saved(stage, bf16, then)
    results["stop"] = cases.stop()
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
