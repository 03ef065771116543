"""The method under DeepSpeed: built sharded, trained, its full parameters where they are needed.

    engine = Engine(cfg, vocab)    builds the method, under zero.Init where the JSON says stage 3
    engine.step(parts, lr)         one optimizer step on this rank's share of a global batch;
                                   GradCache when it has several micro-batches

The config says what is trained; the DeepSpeed JSON says how. Settings that the config owns are
refused in the JSON.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

from glimpse.data.loader import MicroBatch, micro_batch_size
from glimpse.model import ema
from glimpse.model.methods import build_method
from glimpse.model.methods.base import Method
from glimpse.model.towers import Temperature
from glimpse.run.lib.config import ROOT, RunConfig
from glimpse.run.lib.distributed import device, rank, to_device, world_size
from glimpse.run.train import optim

CONFIG_OWNED_KEYS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup",
}


def read_deepspeed_json(path: str) -> dict:
    """The DeepSpeed JSON of a config; a path that is not absolute starts at the repository root."""
    try:
        tree = json.loads((ROOT / path).read_text())
    except FileNotFoundError:
        shipped = sorted(f"ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json"))
        raise ValueError(
            f"deepspeed: {path}: no such file; shipped: {', '.join(shipped)}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}: not JSON: {error}") from None
    check_deepspeed_json(path, tree)
    return tree


def check_deepspeed_json(path: str, tree: dict) -> None:
    """Raise ValueError for settings that belong to the config, or that would train wrongly."""
    zero = tree.get("zero_optimization", {})
    for key, owner in CONFIG_OWNED_KEYS.items():
        if key in tree:
            raise ValueError(
                f"deepspeed: {path} sets {key!r}, which the config owns; remove it there and set"
                f" `{owner}` in the config"
            )
    if zero.get("round_robin_gradients"):
        raise ValueError(
            f"deepspeed: {path} sets zero_optimization.round_robin_gradients, under which DeepSpeed"
            " tells of a weight's fp32 copy where another's lies; remove it"
        )
    if tree.get("fp16", {}).get("enabled"):
        raise ValueError(
            f"deepspeed: {path} enables fp16; contrastive losses overflow in it (docs/running.md),"
            " use bf16"
        )
    if tree.get("bf16", {}).get("enabled") and not zero.get("stage"):
        raise ValueError(
            f"deepspeed: {path}: bf16 without ZeRO keeps no fp32 copy that the temperature could be"
            " read from; use stage 1"
        )


def build_deepspeed_config(cfg: RunConfig, ranks: int) -> dict:
    """The JSON, completed by what the config owns."""
    tree = read_deepspeed_json(cfg.deepspeed)
    betas = list(cfg.optim.betas)
    return {
        **tree,
        "train_batch_size": cfg.batch,
        "gradient_accumulation_steps": cfg.accumulate,
        "train_micro_batch_size_per_gpu": micro_batch_size(cfg.batch, ranks, cfg.accumulate),
        "gradient_clipping": cfg.optim.clip,
        "optimizer": adamw_section(
            tree, lr=cfg.optim.peak_lr(cfg.batch), betas=betas, eps=cfg.optim.eps
        ),
    }


def adamw_section(tree: dict, **settings) -> dict:
    """The optimizer's part of a JSON: torch's AdamW, or DeepSpeed's own on the CPU if the JSON
    offloads it.
    """
    offload = tree.get("zero_optimization", {}).get("offload_optimizer", {})
    if offload.get("device", "none") == "none":
        settings["torch_adam"] = True
    return dict(type="AdamW", params=settings)


def initialize_supervised(
    module: torch.nn.Module,
    groups: list[dict],
    path: str,
    *,
    accumulate: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> deepspeed.DeepSpeedEngine:
    """A trainer for run/evals/supervised.py: AdamW over `groups` of a module that every rank holds
    whole, under a run's DeepSpeed JSON.

    Stage 3 shards the module's own parameters. accumulate: backward passes to a step, whose mean
    gradient it takes.
    """
    tree = read_deepspeed_json(path)
    tree.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    tree |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts by it
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "optimizer": adamw_section(tree, lr=0.0, betas=list(betas), eps=1e-8),
    }
    return deepspeed.initialize(model=module, model_parameters=groups, config=tree)[0]


def gather_state_dict(trainer: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The weights of such a module, whole on every rank; all ranks must call."""
    parameters = list(trainer.module.parameters())
    gather = contextlib.nullcontext()
    if is_sharded(parameters[0]):
        gather = deepspeed.zero.GatheredParameters(parameters)
    with gather:
        return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Return True under ZeRO-3, which leaves a parameter empty and keeps a shard beside it."""
    return hasattr(parameter, "ds_id")


class Engine:
    """The method under DeepSpeed: what the training loop and the evaluations call."""

    def __init__(
        self,
        cfg: RunConfig,
        vocab: int,
        *,
        universal: bool = False,
        load: Callable[[Method], None] | None = None,
    ):
        """load: puts weights into the new method, by whole_parameter; universal: load_checkpoint
        will read that format.
        """
        tree = build_deepspeed_config(cfg, world_size())
        if universal:
            tree["checkpoint"] = {"load_universal": True}
        self.stage = tree.get("zero_optimization", {}).get("stage", 0)
        self.bf16 = bool(tree.get("bf16", {}).get("enabled"))
        self.samples, self.batch, self.total_samples = 0, cfg.batch, cfg.samples

        # 1. Build the method, sharded where the JSON says stage 3, and put weights into it.
        torch.manual_seed(cfg.seed)
        sharded = contextlib.nullcontext()
        if self.stage == 3:
            sharded = deepspeed.zero.Init(config_dict_or_path=tree)
        with sharded:
            method = build_method(cfg, vocab)
        check_buffers(method)
        if load:
            load(method)
        self.method = method

        # 2. Hand it to DeepSpeed, which makes fp32 copies of bf16 weights: they are written again.
        groups = optim.parameter_groups(method, cfg.optim)
        self.ds, *_ = deepspeed.initialize(model=method, model_parameters=groups, config=tree)
        self.group_settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.ds.optimizer.param_groups
        ]
        if load and self.bf16:
            load(method)

        # 3. Watch which trainable parameters get a gradient in a backward pass.
        self.parameters_with_gradient: set[str] = set()
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        for name, parameter in self.trainable.items():
            parameter.register_hook(lambda _, name=name: self.parameters_with_gradient.add(name))

        # 4. The temperature's fp32 value, and the teacher, which begins as the student.
        self.temperatures = [m for m in method.modules() if isinstance(m, Temperature)]
        self.update_temperature_residuals()
        pairs = ema.parameters(method.ema_pairs())
        if self.stage == 3:
            teachers = [teacher for teacher, _ in pairs.values()]
            disable_persistence(teachers, self.ds.optimizer.persistent_parameters)
        self.averages = ema.Average(pairs, local_shard, local_fp32_shard, discard_gathered)
        self.averages.update(0.0)

    def restore(self, folder: Path, found: dict) -> None:
        """Weights, optimizer and counts of a checkpoint folder; `found` is its manifest."""
        loaded, _ = self.ds.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:  # DeepSpeed would go on with an optimizer that starts anew
            raise OSError(f"{folder}: DeepSpeed could not load it")
        # Undo two faults of the universal format with more than one group: all groups get the first
        # one's weight decay, and share one step counter, which each of them then counts up.
        for group, settings in zip(self.ds.optimizer.param_groups, self.group_settings):
            group.update(settings)
        optimizer = getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)
        for state in optimizer.state.values():
            state["step"] = copy.deepcopy(state["step"])
        self.samples, self.ds.global_steps = found["samples"], found["step"]

    def step(self, parts: list[MicroBatch], lr: float) -> tuple[torch.Tensor, dict]:
        """One optimizer step on this rank's share of the global batch (data/loader.py); (loss,
        metrics) of the whole global batch.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        on_device = [to_device(dict(views=part["views"], text=part["text"])) for part in parts]
        if len(on_device) == 1:
            loss, metrics = self.plain_step(on_device[0])
        else:
            loss, metrics = self.cached_step(on_device)
        self.update_temperature_residuals()
        self.samples += self.batch
        # after the step: A-CLIP's release does it before the next forward, which is the same
        if self.averages.pairs:
            self.averages.update(self.method.momentum(self.samples / self.total_samples))
        return loss.detach(), metrics

    def plain_step(self, part: dict) -> tuple[torch.Tensor, dict]:
        loss, metrics = self.method.loss(self.ds(part))
        self.backward(loss)
        return loss, metrics

    def cached_step(self, parts: list[dict]) -> tuple[torch.Tensor, dict]:
        """GradCache (arXiv 2101.06983): the negatives of the whole batch with the memory of a
        micro-batch.

        The third phase sees the same patches and tokens as the first.
        """
        # 1. Features of all micro-batches, without a graph.
        with torch.no_grad():
            outputs = [self.ds(part) for part in parts]
        features = self.concatenate(outputs)

        # 2. The loss of the whole batch, and its gradient with respect to the features.
        loss, metrics = self.method.loss(features)
        gradients = torch.autograd.grad(
            loss, list(features.values()), allow_unused=True, materialize_grads=True
        )
        shares = self.split(dict(zip(features, gradients)), outputs)

        # 3. Each micro-batch again, with a graph: the scalar <features, gradient> has the gradient
        #    of the loss.
        for part, gradient in zip(parts, shares):
            again = self.ds(part)
            self.backward(sum((again[name] * gradient[name]).sum() for name in again))
        return loss, metrics

    def concatenate(self, outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Features of micro-batches -> those of the whole batch, as leaves; `shared` ones are the
        same in all.
        """
        features = {}
        for name, first in outputs[0].items():
            shared = name in self.method.shared
            feature = first if shared else torch.cat([output[name] for output in outputs])
            features[name] = feature.requires_grad_()
        return features

    def split(
        self, gradients: dict[str, torch.Tensor], outputs: list[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """The gradients of the whole batch's features -> those of each micro-batch's."""
        shares: list[dict[str, torch.Tensor]] = [{} for _ in outputs]
        for name, gradient in gradients.items():
            if name in self.method.shared:
                pieces = [gradient / len(outputs)] * len(outputs)
            else:
                pieces = list(gradient.split([len(output[name]) for output in outputs]))
            for share_of, piece in zip(shares, pieces):
                share_of[name] = piece
        return shares

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass and DeepSpeed's step, which updates the weights after the last part
        only.
        """
        self.parameters_with_gradient.clear()
        # parts add up: the loss is already that of the whole batch
        self.ds.backward(loss, scale_wrt_gas=False)
        missed = self.trainable.keys() - self.parameters_with_gradient
        if missed:  # ZeRO-3 would apply their previous gradient again, silently
            raise RuntimeError(
                f"no gradient reached {len(missed)} trainable parameters, e.g. {sorted(missed)[0]};"
                " each must take part in every forward (multiply by 0 what should not learn), or"
                " be frozen"
            )
        self.ds.step()

    @torch.no_grad()
    def update_temperature_residuals(self) -> None:
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


def check_buffers(method: torch.nn.Module) -> None:
    """Raise ValueError for a persistent buffer: DeepSpeed's universal format, by which a run is
    resumed on another number of ranks, silently drops it.
    """
    parameters = dict(method.named_parameters(remove_duplicate=False))
    buffers = sorted(method.state_dict().keys() - parameters.keys())
    if buffers:
        raise ValueError(
            f"method: {type(method).__name__} keeps a persistent buffer, {buffers[0]}, which"
            " checkpoints would lose; register it with persistent=False, or make it a parameter"
        )


def local_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The elements of a parameter that this rank holds, flat: its shard under ZeRO-3, else all."""
    if is_sharded(parameter):
        return zero_attributes(parameter).ds_tensor.data
    return parameter.data.view(-1)


def local_fp32_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The same in the precision that the optimizer works in, without communication.

    Under bf16 in stages 1 and 2, where a rank's fp32 copy is of other elements than it needs, the
    rounded weights.
    """
    if is_sharded(parameter) and parameter.requires_grad:
        return safe_get_local_fp32_param(parameter)
    return local_shard(parameter)


def disable_persistence(
    teachers: list[torch.nn.Parameter], persistent: list[torch.nn.Parameter]
) -> None:
    """Have ZeRO-3 gather small teacher parameters when they are used, as it does large ones.

    It gathers the small ones of a model after each optimizer step, which is before the averages
    change.
    """
    known = {id(parameter) for parameter in teachers}
    for parameter in teachers:
        zero_attributes(parameter).ds_persist = False
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in known]


def discard_gathered(parameter: torch.nn.Parameter) -> None:
    """Make ZeRO-3 forget what it gathered of a frozen parameter before its shard changed."""
    if not is_sharded(parameter):
        return
    sharding = zero_attributes(parameter)
    sharding.ds_secondary_tensor = None  # hierarchical partitioning keeps a second shard
    if sharding.ds_status == ZeroParamStatus.AVAILABLE:
        sharding.partition(has_been_updated=False)


def zero_attributes(parameter: torch.nn.Parameter) -> Any:
    """The parameter itself, for its attributes ds_tensor, ds_shape, ..., which ZeRO-3 adds to it
    and no type knows.
    """
    return parameter


def has_fp32_copy(parameter: torch.nn.Parameter) -> bool:
    """Return True if DeepSpeed has made an fp32 copy of the parameter, which it trains."""
    return parameter.requires_grad and (
        hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    )


@contextlib.contextmanager
def full_parameter(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Yield a tensor of the parameter's full shape for rank 0 to write; afterwards it is on every
    rank, or in every shard.

    It is the parameter itself, or the fp32 copy that DeepSpeed trains, once it has made one.
    """
    with torch.no_grad():
        if has_fp32_copy(parameter):
            sharded = is_sharded(parameter)
            shape = zero_attributes(parameter).ds_shape if sharded else parameter.shape
            full = torch.empty(shape, device=device())
            yield full
            dist.broadcast(full, 0)
            if sharded:
                write_fp32_shard(parameter, full)
            else:
                safe_set_full_fp32_param(parameter, full)
        elif is_sharded(parameter):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                yield parameter
        else:
            yield parameter
            # NCCL sends nothing from a CPU, where a method that is not placed yet lies
            sent = parameter.data.to(device())
            dist.broadcast(sent, 0)
            parameter.data.copy_(sent)


def write_fp32_shard(parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
    """Write this rank's shard of the fp32 copy; DeepSpeed's setter of the whole parameter does not
    know that the last shard is padded.
    """
    size = zero_attributes(parameter).ds_tensor.numel()
    shard = full.flatten()[rank() * size :][:size]
    safe_set_local_fp32_param(parameter, F.pad(shard, (0, size - len(shard))))


def move_to_device(method: torch.nn.Module, bf16: bool) -> torch.nn.Module:
    """Move a method that is not trained to this rank's device, in the precision that its run
    trained in.
    """
    return method.to(device(), torch.bfloat16 if bf16 else torch.float32)
