"""Pretrain a vision-language model.

    deepspeed --num_accelerators 2 run/pretrain.py --config run/configs/quickstart.yaml
    deepspeed --hostfile hostfile run/pretrain.py --config run/configs/flip_l16.yaml \\
        --set run=runs/mine batch=16384

    python run/pretrain.py --plan --ranks 256 --device H100 --config run/configs/flip_h14.yaml
        what it would cost; trains nothing

The run folder is refused if it exists, unless --resume goes on with it: from its newest complete
checkpoint, on any number of ranks.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from glimpse.data.loader import Batches, MicroBatch
from glimpse.data.shards import Shards
from glimpse.data.stream import Stream, is_stream
from glimpse.run.lib import distributed, run_dir
from glimpse.run.lib.config import RunConfig, build_reader, parse_training_arguments
from glimpse.run.train import checkpoint, elastic, engine, initial_weights
from glimpse.run.train.audit import Audit
from glimpse.run.train.log import Log, format_count, peak_flops

# Evaluations, the planner and pictures are imported where they are used: training needs none of
# the packages that only they need.


def main() -> None:
    cfg, args = parse_training_arguments(__doc__)
    if args.plan:
        print(describe_costs(cfg, args))
        return

    # Refuse what is wrong with the JSON, the batch or the run folder before any rank starts.
    engine.build_deepspeed_config(cfg, distributed.world_size())
    home = run_dir.check_run_folder(Path(cfg.run), args.resume)
    distributed.start()
    if args.resume:
        distributed.rank0_first(partial(hold_lock, home))

    # Open everything that the run reads; rank 0 first, which may have to write an index.
    evals = distributed.rank0_first(lambda: parse_evals(cfg))
    batches = build_loader(cfg)
    trainer, manifest = restore(cfg, home, args.resume, batches)
    batches.begin(manifest.get("shards", 0))
    distributed.rank0_first(
        lambda: run_dir.prepare_run_folder(home, cfg, trainer.samples, args.resume)
    )

    steps = trainer.ds.global_steps + (cfg.samples - trainer.samples) // cfg.batch
    log = Log(home, distributed.rank(), steps, cfg.batch)
    log.info(describe_run(cfg, trainer, batches))
    try:
        Training(cfg, home, batches, trainer, evals, log).run()
    finally:
        log.close()


def hold_lock(home: Path) -> None:
    """Take the run folder's lock, on rank 0."""
    if distributed.rank() == 0:
        run_dir.acquire_lock(home)


def describe_costs(cfg: RunConfig, args) -> str:
    """Describe the cost of the config as it is, and the cheapest way that fits the cluster."""
    from glimpse.run.plan import planner

    cluster = planner.Cluster.from_args(args)
    cost = planner.describe_plan(planner.plan(cfg, cluster, args.caption))
    advice = planner.describe_proposal(cfg, planner.propose(cfg, cluster, args.caption))
    return f"{cost}\n\n{advice}"


def parse_evals(cfg: RunConfig) -> list:
    """The evaluations of `evals:`, or ValueError, before the training starts."""
    if not cfg.evals and not cfg.eval_every:
        return []
    from glimpse.run.evals import parse

    return parse(cfg.evals, training=True, data=cfg.eval_data)


def build_loader(cfg: RunConfig) -> Batches | Stream:
    """This rank's batches: by position from indexed folders, front to back from streams."""
    rows = build_reader(cfg)
    share = dict(
        batch=cfg.batch,
        accumulate=cfg.accumulate,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )
    if is_stream(cfg.data.train):
        return Stream(rows, cfg.data.train, **share)
    # rank 0 makes an index where there is none
    return Batches(rows, distributed.rank0_first(lambda: Shards(cfg.data.train)), **share)


def run_identity(cfg: RunConfig, batches: Batches | Stream) -> dict:
    """What a checkpoint and the run that goes on from it have in common."""
    return checkpoint.identity(cfg, batches.reader.tokenizer.fingerprint, batches.fingerprint())


def restore(
    cfg: RunConfig, home: Path, resume: bool, batches: Batches | Stream
) -> tuple[engine.Engine, dict]:
    """The engine at the beginning of the run, or where its newest complete checkpoint left it, and
    that checkpoint's manifest.
    """
    tokenizer = batches.reader.tokenizer

    def newest() -> str:
        complete = checkpoint.complete_checkpoints(home / "checkpoints") if resume else None
        return str(complete[0]) if complete else ""

    path = distributed.broadcast_from_rank0(newest)
    if not path:
        load = initial_weights.init_weights(cfg.init, tokenizer.fingerprint)
        return engine.Engine(cfg, tokenizer.vocab_size, load=load), {}

    checkpoint.check_identity(Path(path), run_identity(cfg, batches))
    checkpoint.check_zero_settings(
        Path(path), engine.build_deepspeed_config(cfg, distributed.world_size())
    )
    universal = elastic.prepare_elastic(Path(path), distributed.world_size())
    trainer = engine.Engine(cfg, tokenizer.vocab_size, universal=universal is not None)
    return trainer, elastic.resume(trainer, Path(path), universal)


class Training:
    """The training loop: update, report, evaluate, save, until the samples are spent or someone
    asks to stop.
    """

    def __init__(
        self,
        cfg: RunConfig,
        home: Path,
        batches: Batches | Stream,
        trainer: engine.Engine,
        evals: list,
        log: Log,
    ):
        self.cfg, self.home, self.batches = cfg, home, batches
        self.trainer, self.evals, self.log = trainer, evals, log
        self.tokenizer = batches.reader.tokenizer
        self.stop = distributed.StopSignal()
        self.audit = Audit(home, distributed.rank(), cfg.data, log.warning)
        self.peak_flops = peak_flops() * distributed.world_size()
        self.saved_samples = trainer.samples
        self.examples = self.read_examples()
        self.flops_per_sample: float | None = None

    def run(self) -> None:
        cfg, trainer = self.cfg, self.trainer
        starts = range(trainer.samples, cfg.samples - cfg.batch + 1, cfg.batch)
        stream = self.batches.stream(starts, pin=distributed.device().type == "cuda")

        while self.has_more_steps() and not self.stop.is_requested():
            # 1. Wait for the batch, and note what could not be read.
            begin = time.perf_counter()
            parts = next(stream)
            self.log.add_wait_time(time.perf_counter() - begin)
            self.audit(self.batches, parts, trainer.samples + cfg.batch)

            # 2. Update.
            lr = cfg.optim.lr_at(trainer.samples, cfg.batch, cfg.samples)
            self.loss, metrics = trainer.step(parts, lr)

            # 3. Report, save and evaluate where it is due.
            self.report(parts, lr, metrics)
            if is_due(cfg.save_every, trainer.samples, cfg.batch):
                self.save()
            if self.has_more_steps() and is_due(cfg.eval_every, trainer.samples, cfg.batch):
                self.evaluate()

        if self.saved_samples < trainer.samples:
            self.save()
        if self.has_more_steps():
            self.log.info(f"asked to stop after {trainer.samples} samples; go on with --resume")
        elif self.evals:
            self.evaluate()

    def has_more_steps(self) -> bool:
        """Return True while the run has samples for another step."""
        return self.trainer.samples + self.cfg.batch <= self.cfg.samples

    def report(self, parts: list[MicroBatch], lr: float, metrics: dict) -> None:
        """Log the step, if its turn has come; the first step also shows what the tower saw."""
        step, trainer = self.trainer.ds.global_steps, self.trainer
        if step == 1:
            from glimpse.run.reports.pictures import masked_inputs_picture

            self.log.add_image(
                "masked inputs", masked_inputs_picture(parts[0], self.cfg), trainer.samples
            )
        if step % self.cfg.log_every and step not in (1, self.log.steps):
            return
        check_finite(float(self.loss), step, self.home)
        values = dict(
            loss=self.loss,
            lr=lr,
            grad_norm=trainer.grad_norm(),
            bad=distributed.all_reduce_sum(torch.tensor(self.audit.bad)),
            **metrics,
        )
        self.log.record_step(step, trainer.samples, self.flops(parts[0]), self.peak_flops, **values)

    def flops(self, part: MicroBatch) -> float:
        """FLOPs of a sample whose caption is as long as the mean of the first batch's; counted
        once, on rank 0, which alone writes records.  nan if the method cannot run without data.
        """
        if self.flops_per_sample is None and distributed.rank() == 0:
            from glimpse.run.plan.flops import count_model_flops

            text = part["text"]
            tokens = len(text["ids"]) / len(text["lengths"])
            # these tokens were filled and masked already
            cfg = replace(self.cfg, data=replace(self.cfg.data, pad_text=False))
            try:
                self.flops_per_sample = count_model_flops(cfg, self.tokenizer.vocab_size, tokens)
            except RuntimeError as error:  # control flow that depends on a tensor's values
                self.flops_per_sample = float("nan")
                self.log.info(f"no MFU: the method's FLOPs cannot be counted ({error})")
        return self.flops_per_sample or 0.0

    def save(self) -> None:
        """Write a checkpoint; one of nan is refused, since it would push the good ones out."""
        trainer = self.trainer
        check_finite(float(self.loss), trainer.ds.global_steps, self.home)
        check_finite(trainer.grad_norm() or 0.0, trainer.ds.global_steps, self.home)
        state = dict(
            identity=run_identity(self.cfg, self.batches),
            shards=distributed.all_reduce_min(self.batches.position()),
        )
        path = checkpoint.save(trainer, self.home / "checkpoints", state, self.cfg.keep)
        self.log.info(f"saved {path}")
        self.saved_samples = trainer.samples

    def read_examples(self) -> tuple[list[bytes], list[str]] | None:
        """A few images and captions, for pictures beside the evaluations."""
        if not isinstance(self.batches, Batches) or not (self.evals or self.cfg.eval_every):
            return None
        from glimpse.run.reports.pictures import read_examples

        return read_examples(self.batches.shards)

    def evaluate(self) -> None:
        """Write a picture of what masks keep and the model attends to, and evaluate the student
        and, where there is one, the teacher.
        """
        from glimpse.run.evals import evaluate
        from glimpse.run.evals.embed import Embedder
        from glimpse.run.reports.pictures import build_gallery, tile_gallery

        trainer, step = self.trainer, self.trainer.ds.global_steps
        if self.examples:
            columns = build_gallery(trainer.method, self.cfg, self.tokenizer, *self.examples)
            self.log.add_image("masks", tile_gallery(columns), trainer.samples)
        for weights in ("student", "teacher") if trainer.method.ema_pairs() else ("student",):
            model = Embedder(
                trainer.method,
                self.cfg,
                self.tokenizer,
                home=self.home,
                tag=f"training-{step}",
                weights=weights,
                say=self.log.info,
            )
            # Features of a job that was killed here may be of weights that differ by a rounding.
            model.forget()
            results = evaluate(model, self.evals)
            self.log.record_evaluation(step, trainer.samples, results, weights)
            model.forget()


def is_due(every: int, samples: int, batch: int) -> bool:
    """Return True if this step crossed a multiple of `every` samples."""
    return every > 0 and samples // every > (samples - batch) // every


def check_finite(value: float, step: int, home: Path) -> None:
    """Raise ValueError if the loss or its gradient is infinite or nan."""
    if not abs(value) < float("inf"):
        raise ValueError(
            f"the loss or its gradient is {value} at step {step}; nothing was saved since"
            f" {home}/checkpoints' newest; lower optim.lr, set optim.clip, or lengthen"
            " optim.warmup, and go on with --resume"
        )


def describe_run(cfg: RunConfig, trainer: engine.Engine, batches: Batches | Stream) -> str:
    """Describe the run in a line."""
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.method.parameters())
    masks = ", ".join(f"{name} {view.mask}" for name, view in cfg.views.items())
    if isinstance(batches, Batches):
        size = f"{len(batches.shards):,} pairs"
    else:
        size = f"{len(batches.urls):,} streamed shards"
    precision = "bf16" if trainer.bf16 else "fp32"
    world = distributed.world_size()
    return (
        f"{cfg.run}: {cfg.method}, {masks}, {cfg.model.size}, {format_count(count)} parameters · "
        f"{world} rank{'' if world == 1 else 's'}, ZeRO {trainer.stage}, {precision} · "
        f"{format_count(cfg.samples)} samples of {size} in {cfg.steps} steps of {cfg.batch}"
    )


if __name__ == "__main__":
    distributed.run_script(main)
