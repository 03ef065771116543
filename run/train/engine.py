"""DeepSpeed's door: a method built sharded, training steps, whole parameters where they are needed.

    engine = Engine(cfg, vocab)         the method, built under zero.Init where the JSON says stage
                                        3
    engine.step(parts, lr)              one optimizer step on this rank's share of a global batch;
                                        GradCache when it has several parts

The config says what is trained; the DeepSpeed JSON says how. What the config owns is refused in the
JSON.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch.nn import functional as F

from glimpse.data.loader import share
from glimpse.model import ema
from glimpse.model.methods import build_method
from glimpse.model.towers import Temperature
from glimpse.run.lib.config import ROOT, Run
from glimpse.run.lib.distributed import device, rank, to_device, world
from glimpse.run.train import optim

OWNED = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup",
}


def read_json(path: str) -> dict:
    """The DeepSpeed JSON of a config; a path that is not absolute starts at the repository root."""
    file = ROOT / path
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        known = ", ".join(
            sorted(f"ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json"))
        )
        raise ValueError(f"deepspeed: {path}: no such file; shipped: {known}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}: not JSON: {error}") from None
    for key, owner in OWNED.items():
        if key in tree:
            raise ValueError(
                f"deepspeed: {path} sets {key!r}, which the config owns; remove it there and set"
                f" `{owner}` in the config"
            )
    if tree.get("zero_optimization", {}).get("round_robin_gradients"):
        raise ValueError(
            f"deepspeed: {path} sets zero_optimization.round_robin_gradients, under which DeepSpeed"
            " tells of a weight's fp32 copy where another's lies; remove it"
        )
    if tree.get("fp16", {}).get("enabled"):
        raise ValueError(
            f"deepspeed: {path} enables fp16; contrastive losses overflow in it (docs/running.md),"
            " use bf16"
        )
    if tree.get("bf16", {}).get("enabled") and not tree.get("zero_optimization", {}).get("stage"):
        raise ValueError(
            f"deepspeed: {path}: bf16 without ZeRO keeps no fp32 copy that the temperature could be"
            " read from; use stage 1"
        )
    return tree


def merged(cfg: Run, ranks: int) -> dict:
    """The JSON with what the config owns put in."""
    tree = read_json(cfg.deepspeed)
    return {
        **tree,
        "train_batch_size": cfg.batch,
        "gradient_accumulation_steps": cfg.accumulate,
        "train_micro_batch_size_per_gpu": share(cfg.batch, ranks, cfg.accumulate),
        "gradient_clipping": cfg.optim.clip,
        "optimizer": adamw(
            tree, lr=cfg.optim.peak(cfg.batch), betas=list(cfg.optim.betas), eps=cfg.optim.eps
        ),
    }


def adamw(tree: dict, **settings) -> dict:
    """The optimizer's part of a JSON: torch's AdamW, or DeepSpeed's own on the CPU where the JSON
    offloads it.
    """
    offload = (
        tree.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        != "none"
    )
    return dict(type="AdamW", params=settings if offload else {**settings, "torch_adam": True})


def wrapped(
    module: torch.nn.Module,
    groups: list[dict],
    path: str,
    *,
    accumulate: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> deepspeed.DeepSpeedEngine:
    """A module that every rank holds whole, under a run's DeepSpeed JSON: a trainer for
    run/evals/supervised.py, AdamW over these groups.

    Stage 3 shards the module's own parameters. accumulate: backward passes to a step, whose mean
    gradient it takes.
    """
    tree = read_json(path)
    tree.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    tree |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        # 1: DeepSpeed only counts by it
        "optimizer": adamw(tree, lr=0.0, betas=list(betas), eps=1e-8),
    }
    return deepspeed.initialize(model=module, model_parameters=groups, config=tree)[0]


def unwrapped(trainer: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The weights of such a module, whole on every rank; all ranks must ask."""
    held = list(trainer.module.parameters())
    with (
        deepspeed.zero.GatheredParameters(held)
        if hasattr(held[0], "ds_id")
        else contextlib.nullcontext()
    ):
        return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


class Engine:
    """The method under DeepSpeed: what the training loop and the evaluations call."""

    def __init__(
        self,
        cfg: Run,
        vocab: int,
        *,
        universal: bool = False,
        load: Callable[[torch.nn.Module], None] | None = None,
    ):
        """load: puts weights into the new method, by whole_parameter; universal: load_checkpoint
        will read that format.
        """
        tree = merged(cfg, world())
        if universal:
            tree["checkpoint"] = {"load_universal": True}
        self.stage = tree.get("zero_optimization", {}).get("stage", 0)
        torch.manual_seed(cfg.seed)
        with (
            deepspeed.zero.Init(config_dict_or_path=tree)
            if self.stage == 3
            else contextlib.nullcontext()
        ):
            method = build_method(cfg, vocab)
        if load:
            load(method)
        self.ds, *_ = deepspeed.initialize(
            model=method, model_parameters=optim.groups(method, cfg.optim), config=tree
        )
        self.method, self.samples, self.batch, self.length = method, 0, cfg.batch, cfg.samples
        self.settings = [
            {k: v for k, v in group.items() if k != "params"}
            for group in self.ds.optimizer.param_groups
        ]
        self.bf16 = bool(tree.get("bf16", {}).get("enabled"))
        if load and self.bf16:
            load(method)  # again: DeepSpeed has made its fp32 copies of the rounded weights
        self.temperatures = [m for m in method.modules() if isinstance(m, Temperature)]
        self.got: set[str] = set()  # trainable parameters that got a gradient in this backward pass
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        for name, parameter in self.trainable.items():
            parameter.register_hook(lambda _, name=name: self.got.add(name))
        self.exact_temperature()
        pairs = ema.parameters(method.averaged())
        if self.stage == 3:
            unkept(
                [teacher for teacher, _ in pairs.values()], self.ds.optimizer.persistent_parameters
            )
        self.average = ema.Average(pairs, own_part, newest_part, written)
        self.average.update(0.0)  # the teacher begins as the student

    def restore(self, folder: Path, found: dict) -> None:
        """Weights, optimizer and counts of a checkpoint folder; `found` is its manifest."""
        loaded, _ = self.ds.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:  # DeepSpeed would go on with an optimizer that starts anew
            raise OSError(f"{folder}: DeepSpeed could not load it")
        # Two faults of the universal format with more than one group, undone: all groups get the
        # first one's weight decay, and share
        # one step counter, which each of them then counts up.
        for group, settings in zip(self.ds.optimizer.param_groups, self.settings):
            group.update(settings)
        for state in getattr(self.ds.optimizer, "optimizer", self.ds.optimizer).state.values():
            state["step"] = copy.deepcopy(state["step"])
        self.samples, self.ds.global_steps = found["samples"], found["step"]

    def step(self, parts: list[dict], lr: float) -> tuple[torch.Tensor, dict]:
        """One optimizer step on this rank's share of the global batch (data/loader.py); (loss,
        metrics) of the whole global batch.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        parts = [to_device(dict(views=part["views"], text=part["text"])) for part in parts]
        loss, metrics = self.plain_step(*parts) if len(parts) == 1 else self.cached_step(parts)
        self.exact_temperature()
        self.samples += self.batch
        # after the step: A-CLIP's release does it before the next forward, which is the same
        if self.average.pairs:
            self.average.update(self.method.momentum(self.samples / self.length))
        return loss.detach(), metrics

    def plain_step(self, part: dict) -> tuple[torch.Tensor, dict]:
        loss, metrics = self.method.loss(self.ds(part))
        self.backward(loss)
        return loss, metrics

    def cached_step(self, parts: list[dict]) -> tuple[torch.Tensor, dict]:
        """GradCache (arXiv 2101.06983): the negatives of the whole batch with the memory of a part.

        The loss sees the features of all parts, made without a graph; its gradient in them is then
        carried through each part's own
        forward, which sees the same patches and tokens again, by the scalar <features, gradient>.
        """
        with torch.no_grad():
            made = [self.ds(part) for part in parts]
        shared = self.method.shared
        features = {
            k: (made[0][k] if k in shared else torch.cat([m[k] for m in made])).requires_grad_()
            for k in made[0]
        }
        loss, metrics = self.method.loss(features)
        gradients = dict(
            zip(
                features,
                torch.autograd.grad(
                    loss, list(features.values()), allow_unused=True, materialize_grads=True
                ),
            )
        )
        shares = {
            k: [g / len(parts)] * len(parts) if k in shared else g.split([len(m[k]) for m in made])
            for k, g in gradients.items()
        }
        for i, part in enumerate(parts):
            again = self.ds(part)
            self.backward(sum((again[k] * shares[k][i]).sum() for k in again))
        return loss, metrics

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass and DeepSpeed's step, which updates the weights after the last part
        only.
        """
        self.got.clear()
        # parts add up: the loss is already that of the whole batch
        self.ds.backward(loss, scale_wrt_gas=False)
        missed = self.trainable.keys() - self.got
        if missed:  # ZeRO-3 would apply their previous gradient again, silently
            raise RuntimeError(
                f"no gradient reached {len(missed)} trainable parameters, e.g. {sorted(missed)[0]};"
                " each must take part in every forward (multiply by 0 what should not learn), or"
                " be frozen"
            )
        self.ds.step()

    @torch.no_grad()
    def exact_temperature(self) -> None:
        """Under bf16, hand the forward what rounding took from the temperature: near ln 100 bf16
        steps are 3 % of the scale.
        """
        if not self.bf16:
            return
        for module in self.temperatures:
            master = safe_get_full_fp32_param(module.logit_scale)
            if master is not None:
                module.residual = (master - master.to(torch.bfloat16).float()).detach()

    def grad_norm(self) -> float | None:
        norm = self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter, flat: its shard under ZeRO-3, else the whole."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_id") else parameter.data.view(-1)


def newest_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The same in the precision that the optimizer works in, without communication.

    Under bf16 in stages 1 and 2, where a rank's fp32 copy is of other elements than it needs, the
    rounded weights.
    """
    if hasattr(parameter, "ds_id") and parameter.requires_grad:
        return safe_get_local_fp32_param(parameter)
    return own_part(parameter)


def unkept(teachers: list[torch.nn.Parameter], persistent: list[torch.nn.Parameter]) -> None:
    """Have ZeRO-3 gather small teacher parameters when they are used, as it does large ones.

    It gathers the small ones of a model after each optimizer step, which is before the averages
    change.
    """
    known = {id(parameter) for parameter in teachers}
    for parameter in teachers:
        parameter.ds_persist = False
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in known]


def written(parameter: torch.nn.Parameter) -> None:
    """Make ZeRO-3 forget what it gathered of a frozen parameter before its shard changed."""
    if hasattr(parameter, "ds_id"):
        parameter.ds_secondary_tensor = None  # hierarchical partitioning keeps a second shard
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:
            parameter.partition(has_been_updated=False)


def has_copy(parameter: torch.nn.Parameter) -> bool:
    """Has DeepSpeed made an fp32 copy of it, which it trains?"""
    return parameter.requires_grad and (
        hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    )


@contextlib.contextmanager
def whole_parameter(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """What is to be written of a parameter, whole, by rank 0; it is on every rank, or in every
    shard, afterwards.

    That is the parameter itself, or the fp32 copy that DeepSpeed trains, once it has made one.
    """
    sharded = hasattr(parameter, "ds_id")
    with torch.no_grad():
        if has_copy(parameter):
            yield (
                whole := torch.empty(
                    parameter.ds_shape if sharded else parameter.shape, device=device()
                )
            )
            dist.broadcast(whole, 0)
            if not sharded:
                safe_set_full_fp32_param(parameter, whole)
                return
            # of a shard; DeepSpeed's setter of the whole knows no padding of the last
            size = parameter.ds_tensor.numel()
            mine = whole.flatten()[rank() * size :][:size]
            safe_set_local_fp32_param(parameter, F.pad(mine, (0, size - len(mine))))
        elif sharded:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                yield parameter
        else:
            yield parameter
            # NCCL sends nothing from a CPU, where a method that is not placed yet lies
            sent = parameter.data.to(device())
            dist.broadcast(sent, 0)
            parameter.data.copy_(sent)


def place(method: torch.nn.Module, bf16: bool) -> torch.nn.Module:
    """A method that is not trained, on this rank's device, in the precision that its run trained
    in.
    """
    return method.to(device(), torch.bfloat16 if bf16 else torch.float32)
