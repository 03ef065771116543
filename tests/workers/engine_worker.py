"""Launched by test_engine.py on 2 ranks: results that need a real engine.

All cases run in one process group, and their results are written to a JSON file.

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
    """CLIP with a layer that no forward uses."""

    def __init__(self, *args):
        super().__init__(*args)
        self.forgotten = torch.nn.Linear(8, 8)


METHODS["unused"] = Unused


class Cases:
    """The cases, each a method that returns a result."""

    def __init__(self, data: Path):
        self.data = data

    def config(self, stage: int, *more: str, bf16: bool = False):
        """Return the config of a tiny run; more: overrides."""
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

    def train(self, cfg, steps: int, **engine_options) -> engine.Engine:
        """Return an engine after `steps` steps; sets self.loss and the next micro-batches."""
        reader = config.build_reader(cfg)
        batches = Batches(
            reader,
            Shards(cfg.data.train),
            batch=cfg.batch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        trainer = engine.Engine(cfg, reader.tokenizer.vocab_size, **engine_options)
        for micro_batches in batches.iterate(
            range(0, steps * cfg.batch, cfg.batch), pin_memory=False
        ):
            loss, *_ = trainer.step(micro_batches, 3e-3)
            self.loss = float(loss)
        self.micro_batches = batches[steps * cfg.batch]
        return trainer

    def guard(self, stage: int) -> str:
        """Return the error of a step in which a parameter gets no gradient."""
        try:
            self.train(self.config(stage, "method=unused"), 1)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    def temperature(self, stage: int) -> dict:
        """Return values of the temperature under bf16, after three steps and when clamped.

        They are the fp32 master copy, the rounded bf16 parameter, the residual and the scale.
        """
        trainer = self.train(self.config(stage, bf16=True), 3)
        (module,) = trainer.temperatures
        with gather_parameters([module.logit_scale]):
            rounded = module.logit_scale.item()
            dtype = str(module.logit_scale.dtype)
        master = safe_get_full_fp32_param(module.logit_scale)
        results = dict(
            master=master.item(),
            rounded=rounded,
            dtype=dtype,
            residual=float(module.residual),
            scale=self.scale(trainer),
        )
        trainer.ds.destroy()

        clamped = self.train(self.config(stage, bf16=True), 1, load=raise_temperature)
        results["clamped"] = self.scale(clamped)
        results["loss"] = self.loss
        clamped.ds.destroy()
        return results

    def scale(self, trainer: engine.Engine) -> float:
        """Return the logit scale that a forward uses."""
        first = self.micro_batches[0]
        inputs = distributed.to_device(dict(views=first["views"], text=first["text"]))
        with torch.no_grad():
            return float(trainer.ds(inputs)["scale"])

    def groups(self, *flavour: str) -> list[dict]:
        """Return {name: numel} of each optimizer group of a method built under zero.Init."""
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

    def save_and_load(self, stage: int, bf16: bool, new_stage: int) -> dict:
        """Save four checkpoints, of which two remain; read the last, and load it into a new engine.

        The new engine has another ZeRO stage and another seed.
        """
        frozen = "model.vision.freeze_patch=true"
        trainer = self.train(self.config(stage, frozen, bf16=bf16), 2)
        folder = self.data / f"saved-{stage}-{bf16}-{new_stage}" / "checkpoints"
        for _ in range(3):
            checkpoint.save(trainer, folder, dict(identity={}, shards=0), keep=2)
            trainer.step(self.micro_batches, 3e-3)
        path = checkpoint.save(trainer, folder, dict(identity={}, shards=0), keep=2)
        masters = self.weights(trainer)
        trainer.ds.destroy()

        # Read the weights from the files, and load them into a new engine.
        read = {name: value.float() for name, value in zero_reader.read_weights(path).items()}
        new_cfg = self.config(new_stage, "seed=7", frozen, bf16=bf16)
        new_trainer = self.train(new_cfg, 0, load=partial(load_model.load_weights, path=path))
        loaded = self.weights(new_trainer)

        moments = [0.0]
        for state in new_trainer.ds.optimizer.optimizer.state.values():
            if "exp_avg" in state and len(state["exp_avg"]):
                moments.append(float(state["exp_avg"].abs().max()))
        results = {}
        results["checkpoints"] = sorted(step.name for step in folder.glob("step-*"))
        results["newest"] = checkpoint.newest_checkpoint(folder.parent).name
        results["missing"] = sorted(masters.keys() - read.keys())
        results["count"] = len(masters)
        results["read differently"] = [
            name for name in masters.keys() & read.keys() if not read[name].equal(masters[name])
        ]
        results["loaded differently"] = [
            name for name in masters if not loaded[name].equal(masters[name])
        ]
        results["moments"] = max(moments)
        results["steps"] = new_trainer.ds.global_steps
        new_trainer.step(self.micro_batches, 1e-3)
        new_trainer.ds.destroy()
        return results

    def weights(self, trainer: engine.Engine) -> dict[str, torch.Tensor]:
        """Return {name: full fp32 weight}; frozen parameters have no master copy."""
        weights = {}
        for name, parameter in trainer.method.named_parameters():
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            with gather_parameters([parameter]):
                value = parameter if master is None else master
                weights[name] = value.detach().float().cpu().clone()
        return weights

    def stop(self) -> list[int]:
        """Return the step at which each rank stops, when rank 1 gets a signal before step 2."""
        stop = distributed.StopSignal()
        last_step = -1
        for step in range(10):
            if step == 2 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.is_requested():
                last_step = step
                break
        last_steps = torch.zeros(2)
        last_steps[distributed.rank()] = last_step
        return distributed.all_reduce_sum(last_steps).tolist()


def raise_temperature(method) -> None:
    """Set logit_scale far above ln 100."""
    with engine.full_parameter(method.towers.temperature.logit_scale) as logit_scale:
        logit_scale.fill_(6.0)


def gather_parameters(parameters):
    """Gather those of the parameters that are sharded; a context manager."""
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
    for stage, bf16, new_stage in (
        (0, False, 3),
        (1, False, 3),
        (3, False, 1),
        (3, False, 3),
        (1, True, 3),
        (3, True, 1),
        (3, True, 2),
        (3, True, 3),
    ):
        case = f"saved {stage} {bf16} {new_stage}"
        results[case] = cases.save_and_load(stage, bf16, new_stage)
    results["stop"] = cases.stop()
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    distributed.run_script(main)
