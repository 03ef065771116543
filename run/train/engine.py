"""The training engine: a method wrapped by DeepSpeed.

    engine = Engine(cfg, vocab_size)   builds the method, sharded under ZeRO-3
    engine.step(micro_batches, lr)     takes one optimizer step on this rank's share of a global
                                       batch; GradCache if it has several micro-batches

The config defines what is trained, the DeepSpeed JSON how. build_deepspeed_config() combines them
and rejects JSON keys that the config sets. full_parameter() and local_shard() read and write
parameters whether they are sharded or not.
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

# {key of a DeepSpeed JSON: the config key that sets it}
CONFIG_OWNED_KEYS = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup",
}


def read_deepspeed_json(path: str) -> dict:
    """Read and check a DeepSpeed JSON; a relative path starts at the repository root."""
    try:
        ds_config = json.loads((ROOT / path).read_text())
    except FileNotFoundError:
        shipped = sorted(f"ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json"))
        raise ValueError(
            f"deepspeed: {path}: no such file; the shipped ones are {', '.join(shipped)}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}: not JSON: {error}") from None
    check_deepspeed_json(path, ds_config)
    return ds_config


def check_deepspeed_json(path: str, ds_config: dict) -> None:
    """Raise ValueError for keys that the config sets, and for settings that train incorrectly."""
    zero = ds_config.get("zero_optimization", {})
    bf16 = ds_config.get("bf16", {}).get("enabled")
    for key, config_key in CONFIG_OWNED_KEYS.items():
        if key in ds_config:
            raise ValueError(
                f"deepspeed: {path} sets {key!r}, which the config owns; remove it there and set"
                f" `{config_key}` in the config"
            )
    if zero.get("round_robin_gradients"):
        raise ValueError(
            f"deepspeed: {path} sets zero_optimization.round_robin_gradients, with which DeepSpeed"
            " returns the wrong parameter's fp32 master copy; remove it"
        )
    if ds_config.get("fp16", {}).get("enabled"):
        raise ValueError(
            f"deepspeed: {path} enables fp16; contrastive losses overflow in it"
            " (docs/launching.md), so use bf16"
        )
    if bf16 and not zero.get("stage"):
        raise ValueError(
            f"deepspeed: {path}: bf16 without ZeRO has no fp32 master copies, which the temperature"
            " needs; use stage 1"
        )


def build_deepspeed_config(cfg: RunConfig, ranks: int) -> dict:
    """Return the DeepSpeed JSON of a run, completed with the settings from its config."""
    ds_config = read_deepspeed_json(cfg.deepspeed)
    optimizer = adamw_section(
        ds_config, lr=cfg.optim.peak_lr(cfg.batch), betas=list(cfg.optim.betas), eps=cfg.optim.eps
    )
    return {
        **ds_config,
        "train_batch_size": cfg.batch,
        "gradient_accumulation_steps": cfg.accumulate,
        "train_micro_batch_size_per_gpu": micro_batch_size(cfg.batch, ranks, cfg.accumulate),
        "gradient_clipping": cfg.optim.clip,
        "optimizer": optimizer,
    }


def adamw_section(ds_config: dict, **settings) -> dict:
    """Return the "optimizer" section of a DeepSpeed JSON.

    It selects torch's AdamW, or DeepSpeed's CPU AdamW if the JSON offloads the optimizer.
    """
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {})
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
    """Wrap a module for supervised training (run/evals/supervised.py) under a DeepSpeed JSON.

    Every rank passes the full module; stage 3 shards its parameters in place. groups: parameter
    groups for AdamW. accumulate: backward passes per optimizer step, which uses their mean
    gradient.
    """
    ds_config = read_deepspeed_json(path)
    zero = ds_config.setdefault("zero_optimization", {})
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    ds_config |= {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports throughput with it
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "optimizer": adamw_section(ds_config, lr=0.0, betas=list(betas), eps=1e-8),
    }
    return deepspeed.initialize(model=module, model_parameters=groups, config=ds_config)[0]


def gather_state_dict(trainer: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Return the full state_dict of a module under DeepSpeed on every rank; all ranks must call."""
    parameters = list(trainer.module.parameters())
    gather = contextlib.nullcontext()
    if is_sharded(parameters[0]):
        gather = deepspeed.zero.GatheredParameters(parameters)
    with gather:
        return {name: value.detach().clone() for name, value in trainer.module.state_dict().items()}


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """Return True under ZeRO-3, where `parameter.data` is empty and ds_tensor holds a shard."""
    return hasattr(parameter, "ds_id")


class Engine:
    """A method under DeepSpeed, as the training loop uses it.

    Public attributes: method, ds (the DeepSpeedEngine), samples (processed so far), averages (the
    moving average of the student's parameters, which is the teacher), stage (of ZeRO), bf16.
    """

    def __init__(
        self,
        cfg: RunConfig,
        vocab_size: int,
        *,
        universal: bool = False,
        load: Callable[[Method], None] | None = None,
    ):
        """Build the method and initialize DeepSpeed.

        universal: the checkpoint passed to restore() is in DeepSpeed's universal format. load:
        writes the initial weights into the method; called before deepspeed.initialize, and under
        bf16 again after it.
        """
        ds_config = build_deepspeed_config(cfg, world_size())
        if universal:
            ds_config["checkpoint"] = {"load_universal": True}
        self.stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        self.bf16 = bool(ds_config.get("bf16", {}).get("enabled"))
        self.samples = 0
        self.batch = cfg.batch
        self.total_samples = cfg.samples

        # 1. Build the method, sharded from the start under ZeRO-3, and load the initial weights.
        torch.manual_seed(cfg.seed)
        shard_on_creation = contextlib.nullcontext()
        if self.stage == 3:
            shard_on_creation = deepspeed.zero.Init(config_dict_or_path=ds_config)
        with shard_on_creation:
            method = build_method(cfg, vocab_size)
        check_buffers(method)
        if load:
            load(method)
        self.method = method

        # 2. Initialize DeepSpeed. It makes the fp32 master copies from the bf16 parameters, so the
        #    initial weights are written once more, now at full precision.
        groups = optim.parameter_groups(method, cfg.optim)
        self.ds, *_ = deepspeed.initialize(model=method, model_parameters=groups, config=ds_config)
        self.group_settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.ds.optimizer.param_groups
        ]
        if load and self.bf16:
            load(method)

        # 3. Record which trainable parameters receive a gradient; backward() checks that all do.
        self.parameters_with_gradient: set[str] = set()
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        for name, parameter in self.trainable.items():
            parameter.register_hook(lambda _, name=name: self.parameters_with_gradient.add(name))

        # 4. Set up the temperature's residual, and the teacher, which starts as a copy of the
        #    student (momentum 0 copies).
        self.temperatures = [m for m in method.modules() if isinstance(m, Temperature)]
        self.update_temperature_residuals()
        pairs = ema.pair_parameters(method.ema_pairs())
        if self.stage == 3:
            teachers = [teacher for teacher, _ in pairs.values()]
            disable_persistence(teachers, self.ds.optimizer.persistent_parameters)
        self.averages = ema.MovingAverages(pairs, local_shard, local_fp32_shard, discard_gathered)
        self.averages.update(0.0)

    def restore(self, folder: Path, manifest: dict) -> None:
        """Load weights, optimizer state and counters from a checkpoint folder.

        elastic.resume() loads the teacher's averages and the temperature's residual.

        manifest: the content of the checkpoint's manifest.json.
        """
        loaded, _ = self.ds.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:  # DeepSpeed only logs it, and would train on with an empty optimizer
            raise OSError(f"{folder}: DeepSpeed could not load it")

        # DeepSpeed's universal format has two bugs with several parameter groups. All groups get
        # the first group's weight decay; restore each group's settings. All parameters share one
        # step counter, which each parameter increments; give each its own.
        for group, settings in zip(self.ds.optimizer.param_groups, self.group_settings):
            group.update(settings)
        optimizer = getattr(self.ds.optimizer, "optimizer", self.ds.optimizer)
        for state in optimizer.state.values():
            state["step"] = copy.deepcopy(state["step"])

        self.samples = manifest["samples"]
        self.ds.global_steps = manifest["step"]

    def step(self, micro_batches: list[MicroBatch], lr: float) -> tuple[torch.Tensor, dict]:
        """Take one optimizer step on this rank's share of the global batch (data/loader.py).

        Returns (loss, metrics) of the global batch.
        """
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr

        # 1. Forward, backward and the optimizer step.
        inputs = []
        for micro_batch in micro_batches:
            inputs.append(to_device(dict(views=micro_batch["views"], text=micro_batch["text"])))
        if len(inputs) == 1:
            loss, metrics = self.plain_step(inputs[0])
        else:
            loss, metrics = self.cached_step(inputs)

        # 2. State that follows the new weights: the temperature's residual and the teacher.
        #    A-CLIP's code updates the teacher at the start of the next step; the weights are the
        #    same by then.
        self.update_temperature_residuals()
        self.samples += self.batch
        if self.averages.pairs:
            self.averages.update(self.method.momentum(self.samples / self.total_samples))
        return loss.detach(), metrics

    def plain_step(self, micro_batch: dict) -> tuple[torch.Tensor, dict]:
        """Train on a single micro-batch."""
        loss, metrics = self.method.loss(self.ds(micro_batch))
        self.backward(loss)
        return loss, metrics

    def cached_step(self, micro_batches: list[dict]) -> tuple[torch.Tensor, dict]:
        """Train on several micro-batches with GradCache (arXiv 2101.06983).

        The negatives are those of the whole batch; the activation memory is that of a micro-batch.
        """
        # 1. Features of all micro-batches, without a graph.
        with torch.no_grad():
            outputs = [self.ds(micro_batch) for micro_batch in micro_batches]
        features = self.concatenate(outputs)  # {name: (B, ...)}, leaves that require grad

        # 2. The loss of the whole batch, and its gradient with respect to the features.
        loss, metrics = self.method.loss(features)
        gradients = torch.autograd.grad(
            loss, list(features.values()), allow_unused=True, materialize_grads=True
        )
        micro_gradients = self.split(dict(zip(features, gradients)), outputs)

        # 3. Each micro-batch again, with a graph: the surrogate <features, gradient> has the
        #    gradient of the loss. Both passes see the same patches: masks and noise are part of the
        #    batch, and the teacher does not change before the optimizer step.
        for micro_batch, gradient in zip(micro_batches, micro_gradients):
            output = self.ds(micro_batch)
            self.backward(sum((output[name] * gradient[name]).sum() for name in output))
        return loss, metrics

    def concatenate(self, outputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the features of the whole batch, as leaf tensors that require grad.

        Features in `method.shared_features` (such as the temperature) do not depend on the
        samples; they are taken from the first micro-batch.
        """
        features = {}
        for name, first in outputs[0].items():
            if name in self.method.shared_features:
                feature = first
            else:
                feature = torch.cat([output[name] for output in outputs])
            features[name] = feature.requires_grad_()
        return features

    def split(
        self, gradients: dict[str, torch.Tensor], outputs: list[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """Split the gradients of the whole batch's features into those of each micro-batch."""
        micro_gradients: list[dict[str, torch.Tensor]] = [{} for _ in outputs]
        for name, gradient in gradients.items():
            if name in self.method.shared_features:
                # every micro-batch adds its part of a shared feature's gradient
                pieces = [gradient / len(outputs)] * len(outputs)
            else:
                pieces = list(gradient.split([len(output[name]) for output in outputs]))
            for micro_gradient, piece in zip(micro_gradients, pieces):
                micro_gradient[name] = piece
        return micro_gradients

    def backward(self, loss: torch.Tensor) -> None:
        """Run one backward pass and DeepSpeed's step().

        DeepSpeed updates the weights only after the last micro-batch.
        """
        self.parameters_with_gradient.clear()
        # No division by the accumulation steps: the loss is already the mean of the whole batch.
        self.ds.backward(loss, scale_wrt_gas=False)

        # Under ZeRO-3 a parameter that received no gradient would silently be updated with its
        # gradient from the previous step.
        missing = self.trainable.keys() - self.parameters_with_gradient
        if missing:
            raise RuntimeError(
                f"no gradient reached {len(missing)} trainable parameters, e.g."
                f" {sorted(missing)[0]}; use each in every forward (multiply by 0 where it should"
                " not learn), or freeze it"
            )
        self.ds.step()

    @torch.no_grad()
    def update_temperature_residuals(self) -> None:
        """Set each temperature's residual to its fp32 value minus its bf16 value.

        Near ln 100 neighboring bf16 values of the logit scale are 3 % apart after exp; the forward
        pass adds the residual, so it uses the fp32 value.
        """
        if not self.bf16:
            return
        for module in self.temperatures:
            master = safe_get_full_fp32_param(module.logit_scale)
            if master is not None:
                module.residual = (master - master.to(torch.bfloat16).float()).detach()

    def grad_norm(self) -> float | None:
        """Return the global gradient norm of the last step, before clipping."""
        norm = self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)


def check_buffers(method: torch.nn.Module) -> None:
    """Raise ValueError if the method has a persistent buffer.

    DeepSpeed's universal format, which resumes a run on another number of ranks, silently drops
    buffers.
    """
    parameters = dict(method.named_parameters(remove_duplicate=False))
    buffers = sorted(method.state_dict().keys() - parameters.keys())
    if buffers:
        raise ValueError(
            f"method: {type(method).__name__} has a persistent buffer, {buffers[0]}, which"
            " checkpoints would lose; register it with persistent=False, or make it a parameter"
        )


def local_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return this rank's elements of a parameter, flat: its shard under ZeRO-3, else all."""
    if is_sharded(parameter):
        return zero_attributes(parameter).ds_tensor.data
    return parameter.data.view(-1)


def local_fp32_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the same elements as local_shard() from the fp32 master copy, where it is local.

    That is ZeRO-3 only. In stages 1 and 2 a rank's master copies cover other elements, so the
    result has the parameter's precision (bf16).
    """
    if is_sharded(parameter) and parameter.requires_grad:
        return safe_get_local_fp32_param(parameter)
    return local_shard(parameter)


def disable_persistence(
    teachers: list[torch.nn.Parameter], persistent: list[torch.nn.Parameter]
) -> None:
    """Exclude teacher parameters from ZeRO-3's persistent parameters.

    ZeRO-3 keeps small parameters gathered, and gathers them again after each optimizer step. That
    is before the averages change, so a persistent teacher would be one step old.
    """
    teacher_ids = {id(parameter) for parameter in teachers}
    for parameter in teachers:
        zero_attributes(parameter).ds_persist = False
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in teacher_ids]


def discard_gathered(parameter: torch.nn.Parameter) -> None:
    """Discard ZeRO-3's gathered copy of a frozen parameter after its shard has changed."""
    if not is_sharded(parameter):
        return
    attributes = zero_attributes(parameter)
    attributes.ds_secondary_tensor = None  # hierarchical partitioning keeps a second shard
    if attributes.ds_status == ZeroParamStatus.AVAILABLE:
        attributes.partition(has_been_updated=False)


def zero_attributes(parameter: torch.nn.Parameter) -> Any:
    """Return the parameter itself, typed as Any.

    ZeRO-3 adds attributes such as ds_tensor and ds_shape, which no type declares.
    """
    return parameter


def has_fp32_copy(parameter: torch.nn.Parameter) -> bool:
    """Return True if DeepSpeed trains an fp32 master copy of the parameter."""
    return parameter.requires_grad and (
        hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")
    )


@contextlib.contextmanager
def full_parameter(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Yield a tensor of the parameter's full shape, which rank 0 overwrites.

    On exit its values go from rank 0 to all ranks, or to all shards. They are written to the fp32
    master copy if DeepSpeed has made one, else to the parameter. All ranks must enter.
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
            # NCCL sends only from a GPU; a method that was just built is still on the CPU
            on_device = parameter.data.to(device())
            dist.broadcast(on_device, 0)
            parameter.data.copy_(on_device)


def write_fp32_shard(parameter: torch.nn.Parameter, full: torch.Tensor) -> None:
    """Write this rank's shard of the fp32 master copy from the full tensor.

    DeepSpeed's safe_set_full_fp32_param fails under ZeRO-3 when the last shard is padded.
    """
    size = zero_attributes(parameter).ds_tensor.numel()
    shard = full.flatten()[rank() * size :][:size]
    safe_set_local_fp32_param(parameter, F.pad(shard, (0, size - len(shard))))


def move_to_device(method: torch.nn.Module, bf16: bool) -> torch.nn.Module:
    """Move a method to this rank's device for evaluation, in the precision it was trained in."""
    return method.to(device(), torch.bfloat16 if bf16 else torch.float32)
