"""DeepSpeed's door: start the ranks, build a method sharded, take training steps, leave cleanly.

    start()                             the process group; one process if no launcher set one up
    engine = Engine(cfg, vocab)         the method, built under zero.Init where the JSON says stage 3
    engine.step(parts, lr)              one optimizer step on this rank's share of a global batch, with GradCache when there are several parts
    finish(code)                        leave without tearing the collectives of others

The config says what is trained; the DeepSpeed JSON says how.  What the config owns is refused in the JSON.
"""
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read when deepspeed is imported; it warns otherwise
import deepspeed  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.utils import logger, safe_get_full_fp32_param  # noqa: E402
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: E402

from model.methods import METHODS  # noqa: E402
from model.towers import Temperature  # noqa: E402
from run.lib import optim  # noqa: E402
from run.lib.config import ROOT, Run  # noqa: E402

OWNED = {"train_batch_size": "batch", "train_micro_batch_size_per_gpu": "batch", "gradient_accumulation_steps": "accumulate",
         "gradient_clipping": "optim.clip", "optimizer": "optim", "scheduler": "optim.warmup"}
_once: list[str] = []  # the keys at the store that `once` has used
TIMEOUT = datetime.timedelta(minutes=5)  # for a rank that hangs; a rank that dies ends its launcher's job at once


def start() -> None:
    """Join the launcher's process group, or be the only process where there is no launcher."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "0"))
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and local >= devices:
        raise ValueError(f"--num_gpus: rank {os.environ['RANK']} would be process {local + 1} on a machine with {devices} GPUs; "
                         f"start at most {devices}")
    logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", 1))))
        from deepspeed import ops
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for 38 s, and only speeds inference up
    torch.set_float32_matmul_precision("high")
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)
    get_accelerator().set_device(local)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    dist.barrier()


def once(make: Callable):
    """make(), by rank 0 first and then by the others: for files that the first call makes and the later ones find."""
    _once.append(f"once {len(_once)}")
    if rank():
        store().wait([_once[-1]], datetime.timedelta(hours=12))
    made = make()
    if not rank():
        store().set(_once[-1], "1")
    return made


def store() -> dist.Store:
    """The key-value store of the process group: for waits that are longer than a collective may take."""
    return dist.distributed_c10d._get_default_store()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def to_device(value):
    """A batch or part of it on this rank's device; what is no tensor stays."""
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    return value.to(device(), non_blocking=True) if isinstance(value, torch.Tensor) else value


@contextmanager
def whole_parameter(parameter: torch.nn.Parameter):
    """The parameter whole, to be written by rank 0; what rank 0 wrote is on every rank, or in every shard, afterwards."""
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                yield
        else:
            yield
            dist.broadcast(parameter.data, 0)


def zero_weights(checkpoint: Path) -> dict:
    """The fp32 weights in a ZeRO 1-3 checkpoint, {name: tensor made whole by .contiguous()}."""
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)


def place(method: torch.nn.Module, cfg: Run) -> torch.nn.Module:
    """A method that is not trained, on this rank's device in the precision that its run trained in."""
    bf16 = read_json(cfg.deepspeed).get("bf16", {}).get("enabled")
    return method.to(device(), torch.bfloat16 if bf16 else torch.float32)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks; every rank must ask."""
    values = values.to(device())
    dist.all_reduce(values)
    return values


def least(value: int) -> int:
    """The smallest of the ranks' values; every rank must ask."""
    found = torch.tensor([value], device=device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def read_json(path: str) -> dict:
    """The DeepSpeed JSON of a config; a path that is not absolute starts at the repository root."""
    file = ROOT / path
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(f"ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")))
        raise ValueError(f"deepspeed: {path}: no such file; shipped: {known}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}: not JSON: {error}") from None
    for key, owner in OWNED.items():
        if key in tree:
            raise ValueError(f"deepspeed: {path} sets {key!r}, which the config owns; remove it there and set `{owner}` in the config")
    if tree.get("fp16", {}).get("enabled"):
        raise ValueError(f"deepspeed: {path} enables fp16; contrastive losses overflow in it (docs/running.md), use bf16")
    return tree


def merged(cfg: Run, ranks: int) -> dict:
    """The JSON with what the config owns put in."""
    tree = read_json(cfg.deepspeed)
    if cfg.batch % (ranks * cfg.accumulate):
        raise ValueError(f"batch: {cfg.batch} does not divide by {ranks} ranks x accumulate {cfg.accumulate}")
    offload = tree.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    adam = dict(lr=cfg.optim.peak(cfg.batch), betas=list(cfg.optim.betas), eps=cfg.optim.eps)
    return {**tree, "train_batch_size": cfg.batch, "gradient_accumulation_steps": cfg.accumulate,
            "train_micro_batch_size_per_gpu": cfg.batch // (ranks * cfg.accumulate), "gradient_clipping": cfg.optim.clip,
            "optimizer": dict(type="AdamW", params=adam if offload else {**adam, "torch_adam": True})}


class Engine:
    """The method under DeepSpeed: what the training loop and the evaluations call."""

    def __init__(self, cfg: Run, vocab: int, *, universal: bool = False, load: Callable[[torch.nn.Module], None] | None = None):
        """load: puts weights into the new method before DeepSpeed copies them; universal: load_checkpoint will read that format."""
        tree = merged(cfg, world())
        if universal:
            tree["checkpoint"] = {"load_universal": True}
        self.stage = tree.get("zero_optimization", {}).get("stage", 0)
        torch.manual_seed(cfg.seed)
        with deepspeed.zero.Init(config_dict_or_path=tree) if self.stage == 3 else nullcontext():
            method = METHODS[cfg.method](cfg.model, vocab, cfg.data.context)
        if load:
            load(method)
        self.ds, *_ = deepspeed.initialize(model=method, model_parameters=optim.groups(method, cfg.optim), config=tree)
        self.method, self.samples, self.batch = method, 0, cfg.batch
        self.bf16 = bool(tree.get("bf16", {}).get("enabled"))
        self.temperatures = [m for m in method.modules() if isinstance(m, Temperature)]
        self.got: set[str] = set()  # trainable parameters that got a gradient in this backward pass
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        for name, parameter in self.trainable.items():
            parameter.register_hook(lambda _, name=name: self.got.add(name))
        self.exact_temperature()

    def step(self, parts: list[dict], lr: float) -> tuple[torch.Tensor, dict]:
        """One optimizer step; parts: this rank's share of the global batch (data/batches.py).  Returns (loss, metrics) of the global batch."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        parts = [to_device(dict(views=part["views"], text=part["text"])) for part in parts]
        loss, metrics = self.plain_step(*parts) if len(parts) == 1 else self.cached_step(parts)
        self.exact_temperature()
        self.samples += self.batch
        return loss.detach(), metrics

    def plain_step(self, part: dict) -> tuple[torch.Tensor, dict]:
        loss, metrics = self.method.loss(self.ds(part))
        self.backward(loss)
        return loss, metrics

    def cached_step(self, parts: list[dict]) -> tuple[torch.Tensor, dict]:
        """GradCache (arXiv 2101.06983): the negatives of the whole batch with the memory of a part.

        The loss sees the features of all parts, made without a graph; its gradient in them is then carried through each part's own
        forward, which sees the same patches and tokens again, by the scalar <features, gradient>.
        """
        with torch.no_grad():
            made = [self.ds(part) for part in parts]
        shared = self.method.shared
        features = {k: (made[0][k] if k in shared else torch.cat([m[k] for m in made])).requires_grad_() for k in made[0]}
        loss, metrics = self.method.loss(features)
        gradients = dict(zip(features, torch.autograd.grad(loss, list(features.values()))))
        shares = {k: [g / len(parts)] * len(parts) if k in shared else g.split([len(m[k]) for m in made]) for k, g in gradients.items()}
        for i, part in enumerate(parts):
            again = self.ds(part)
            self.backward(sum((again[k] * shares[k][i]).sum() for k in again))
        return loss, metrics

    def backward(self, loss: torch.Tensor) -> None:
        """One backward pass and DeepSpeed's step, which updates the weights after the last part only."""
        self.got.clear()
        self.ds.backward(loss, scale_wrt_gas=False)  # parts add up: the loss is already that of the whole batch
        missed = self.trainable.keys() - self.got
        if missed:  # ZeRO-3 would apply their previous gradient again, silently
            raise RuntimeError(f"no gradient reached {len(missed)} trainable parameters, e.g. {sorted(missed)[0]}; "
                               "each must take part in every forward (multiply by 0 what should not learn), or be frozen")
        self.ds.step()

    @torch.no_grad()
    def exact_temperature(self) -> None:
        """Under bf16, hand the forward what rounding took from the temperature: near ln 100 bf16 steps are 3 % of the scale."""
        if not self.bf16:
            return
        for module in self.temperatures:
            master = safe_get_full_fp32_param(module.logit_scale)
            if master is not None:
                module.residual = (master - master.to(torch.bfloat16).float()).detach()

    def grad_norm(self) -> float | None:
        norm = self.ds.get_global_grad_norm()
        return None if norm is None else float(norm)


class Stop:
    """SIGTERM or SIGINT, agreed on by all ranks: `asked()` becomes true on every rank after the same step.

    The flags are reduced behind the step's back and read one step later, so that no step waits for them.
    """

    def __init__(self):
        import signal
        self.flag, self.pending = 0.0, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_) -> None:
        self.flag = 1.0

    def asked(self) -> bool:
        answer = False
        if self.pending is not None:
            work, flags = self.pending
            work.wait()
            answer = bool(flags.item())
        flags = torch.tensor([self.flag], device=device())
        self.pending = dist.all_reduce(flags, async_op=True), flags
        return answer


def finish(code: int = 0) -> None:
    """Leave at once: gloo's threads abort 8-20 % of the processes that end through the interpreter (docs/log.md)."""
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on this rank; what a user can mend is told in one line, by the first rank that meets it."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if rank():
            time.sleep(3)  # where all ranks fail alike, rank 0 speaks and the launcher ends the others meanwhile
        print(f"error: {error}" if not rank() else f"error on rank {rank()}: {error}", file=sys.stderr)
        finish(2)
    except BaseException as error:
        if isinstance(error, SystemExit):
            finish(error.code if isinstance(error.code, int) else 1)
        import traceback
        traceback.print_exc()
        finish(1)
    finish(0)
