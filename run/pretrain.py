"""Pretrain a vision-language model.

    deepspeed --num_accelerators 2 run/pretrain.py --config run/configs/quickstart.yaml
    deepspeed --hostfile hostfile run/pretrain.py --config run/configs/flip_l16.yaml \\
        --set run=runs/flip_l16_16k batch=16384

    python run/pretrain.py --plan --ranks 256 --device H100 --config run/configs/flip_h14.yaml
        estimate the cost of the run, without training

An existing run folder is an error, unless --resume continues the run from its newest complete
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

# Evaluations, the planner and pictures are imported inside the functions that use them: a container
# for training need not have their packages.


def main() -> None:
    cfg, args = parse_training_arguments(__doc__)
    if args.plan:
        print(describe_costs(cfg, args))
        return

    # 1. Check the DeepSpeed JSON, the batch size and the run folder before the ranks connect.
    engine.build_deepspeed_config(cfg, distributed.world_size())
    run_folder = run_dir.check_run_folder(Path(cfg.run), args.resume)
    distributed.start()
    if args.resume:
        distributed.rank0_first(partial(lock_run_folder, run_folder))

    # 2. Open the data, and build or restore the model. A new run's folder is created last, so an
    #    error leaves none behind.
    evals = distributed.rank0_first(lambda: parse_evals(cfg))
    batches = build_loader(cfg)
    trainer, manifest = build_engine(cfg, run_folder, args.resume, batches)
    batches.seek(manifest.get("shards", 0))
    distributed.rank0_first(
        lambda: run_dir.prepare_run_folder(run_folder, cfg, trainer.samples, args.resume)
    )

    # 3. Train. A resumed run may have another batch size: count the steps that remain.
    steps = trainer.ds.global_steps + (cfg.samples - trainer.samples) // cfg.batch
    log = Log(run_folder, distributed.rank(), steps, cfg.batch)
    log.info(describe_run(cfg, trainer, batches))
    try:
        Training(cfg, run_folder, batches, trainer, evals, log).run()
    finally:
        log.close()


def lock_run_folder(run_folder: Path) -> None:
    """Lock the run folder, on rank 0."""
    if distributed.rank() == 0:
        run_dir.acquire_lock(run_folder)


def describe_costs(cfg: RunConfig, args) -> str:
    """Describe the cost of a config, and the cheapest settings with which it fits the cluster."""
    from glimpse.run.plan import planner

    cluster = planner.Cluster.from_args(args)
    cost = planner.describe_plan(planner.plan(cfg, cluster, args.caption))
    advice = planner.describe_proposal(cfg, planner.propose(cfg, cluster, args.caption))
    return f"{cost}\n\n{advice}"


def parse_evals(cfg: RunConfig) -> list:
    """Parse and check the evaluations of `evals:`, so that an error shows before training."""
    if not cfg.evals and not cfg.eval_every:
        return []
    from glimpse.run.evals import parse_evaluations

    return parse_evaluations(cfg.evals, training=True, data=cfg.eval_data)


def build_loader(cfg: RunConfig) -> Batches | Stream:
    """Build the loader of this rank's batches.

    Folders of shards are indexed and read by position; streams are read sequentially.
    """
    reader = build_reader(cfg)
    split = dict(
        batch=cfg.batch,
        accumulate=cfg.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    if is_stream(cfg.data.train):
        return Stream(reader, cfg.data.train, **split)
    # Rank 0 first: it writes the index if there is none.
    shards = distributed.rank0_first(lambda: Shards(cfg.data.train))
    return Batches(reader, shards, **split)


def run_identity(cfg: RunConfig, batches: Batches | Stream) -> dict:
    """Return the settings that must match between a checkpoint and the run that resumes from it."""
    return checkpoint.identity(cfg, batches.reader.tokenizer.fingerprint, batches.fingerprint())


def build_engine(
    cfg: RunConfig, run_folder: Path, resume: bool, batches: Batches | Stream
) -> tuple[engine.Engine, dict]:
    """Build the engine, with initial weights or from the newest complete checkpoint.

    Returns (engine, the checkpoint's manifest; {} for a new run).
    """
    tokenizer = batches.reader.tokenizer

    # Rank 0 chooses the checkpoint: network file systems may show different files to other ranks.
    def newest() -> str:
        complete = checkpoint.complete_checkpoints(run_folder / "checkpoints") if resume else None
        return str(complete[0]) if complete else ""

    newest_path = distributed.broadcast_from_rank0(newest)

    # A new run, or one that was interrupted before its first checkpoint.
    if not newest_path:
        load = initial_weights.init_weights(cfg.init, tokenizer.fingerprint)
        return engine.Engine(cfg, tokenizer.vocab_size, load=load), {}

    # A run that resumes.
    path = Path(newest_path)
    ranks = distributed.world_size()
    checkpoint.check_identity(path, run_identity(cfg, batches))
    checkpoint.check_zero_settings(path, engine.build_deepspeed_config(cfg, ranks))
    universal = elastic.prepare_elastic(path, ranks)
    trainer = engine.Engine(cfg, tokenizer.vocab_size, universal=universal is not None)
    return trainer, elastic.resume(trainer, path, universal)


class Training:
    """The training loop: take steps, log, save and evaluate.

    It ends after cfg.samples samples, or earlier on SIGTERM or SIGINT.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run_folder: Path,
        batches: Batches | Stream,
        trainer: engine.Engine,
        evals: list,
        log: Log,
    ):
        self.cfg = cfg
        self.run_folder = run_folder
        self.batches = batches
        self.trainer = trainer
        self.evals = evals
        self.log = log
        self.tokenizer = batches.reader.tokenizer
        self.stop = distributed.StopSignal()
        self.audit = Audit(run_folder, distributed.rank(), cfg.data, log.warning)
        self.peak_flops = peak_flops() * distributed.world_size()
        self.saved_samples = trainer.samples  # samples seen at the newest checkpoint
        self.examples = self.read_examples()
        self.flops_per_sample: float | None = None  # computed at the first record

    def run(self) -> None:
        """Train until the end of the run or a signal, then save and evaluate."""
        cfg, trainer = self.cfg, self.trainer
        starts = range(trainer.samples, cfg.samples - cfg.batch + 1, cfg.batch)
        batch_iterator = self.batches.iterate(
            starts, pin_memory=distributed.device().type == "cuda"
        )

        while self.has_more_steps() and not self.stop.is_requested():
            # 1. Wait for the batch, and count samples that could not be read.
            begin = time.perf_counter()
            micro_batches = next(batch_iterator)
            self.log.add_wait_time(time.perf_counter() - begin)
            self.audit(self.batches, micro_batches, trainer.samples + cfg.batch)

            # 2. Take the optimizer step.
            lr = cfg.optim.lr_at(trainer.samples, cfg.batch, cfg.samples)
            self.loss, metrics = trainer.step(micro_batches, lr)

            # 3. Log, save and evaluate, each at its interval.
            self.log_step(micro_batches, lr, metrics)
            if is_due(cfg.save_every, trainer.samples, cfg.batch):
                self.save()
            if self.has_more_steps() and is_due(cfg.eval_every, trainer.samples, cfg.batch):
                self.evaluate()

        # 4. Save unless the last step has just done so; evaluate at the end of the run only.
        if self.saved_samples < trainer.samples:
            self.save()
        if self.has_more_steps():
            self.log.info(f"stopped after {trainer.samples} samples; continue with --resume")
        elif self.evals:
            self.evaluate()

    def has_more_steps(self) -> bool:
        """Return True while the run has samples for another step."""
        return self.trainer.samples + self.cfg.batch <= self.cfg.samples

    def log_step(self, micro_batches: list[MicroBatch], lr: float, metrics: dict) -> None:
        """Log every log_every-th step, the first and the last.

        The first step also adds a picture of the masked inputs to TensorBoard.
        """
        step, trainer = self.trainer.ds.global_steps, self.trainer
        if step == 1:
            from glimpse.run.reports.pictures import masked_inputs_picture

            picture = masked_inputs_picture(micro_batches[0], self.cfg)
            self.log.add_image("masked inputs", picture, trainer.samples)
        if step % self.cfg.log_every and step not in (1, self.log.steps):
            return

        # float(loss) waits for the GPU, so the loss is only checked here and in save().
        check_finite(float(self.loss), step, self.run_folder)
        values = dict(
            loss=self.loss,
            lr=lr,
            grad_norm=trainer.grad_norm(),
            bad=distributed.all_reduce_sum(torch.tensor(self.audit.bad_count)),
            **metrics,
        )
        flops = self.flops(micro_batches[0])
        self.log.record_step(step, trainer.samples, flops, self.peak_flops, **values)

    def flops(self, micro_batch: MicroBatch) -> float:
        """Return the model FLOPs per sample, for the mean caption length of the first micro-batch.

        Computed once, on rank 0, which writes the records. nan if the method's forward depends on
        the values of tensors, which fake tensors do not have.
        """
        if self.flops_per_sample is None and distributed.rank() == 0:
            from glimpse.run.plan.flops import count_model_flops

            text = micro_batch["text"]
            tokens = len(text["ids"]) / len(text["lengths"])
            # The loader has already padded and masked these tokens.
            cfg = replace(self.cfg, data=replace(self.cfg.data, pad_text=False))
            try:
                self.flops_per_sample = count_model_flops(cfg, self.tokenizer.vocab_size, tokens)
            except RuntimeError as error:
                self.flops_per_sample = float("nan")
                self.log.info(f"no MFU: the method's FLOPs cannot be counted ({error})")
        return self.flops_per_sample or 0.0

    def save(self) -> None:
        """Write a checkpoint.

        Raises ValueError if the loss or gradient is not finite: such a checkpoint would replace an
        older, good one.
        """
        trainer = self.trainer
        check_finite(float(self.loss), trainer.ds.global_steps, self.run_folder)
        check_finite(trainer.grad_norm() or 0.0, trainer.ds.global_steps, self.run_folder)
        state = dict(
            identity=run_identity(self.cfg, self.batches),
            shards=distributed.all_reduce_min(self.batches.resume_cursor()),
        )
        path = checkpoint.save(trainer, self.run_folder / "checkpoints", state, self.cfg.keep)
        self.log.info(f"saved {path}")
        self.saved_samples = trainer.samples

    def read_examples(self) -> tuple[list[bytes], list[str]] | None:
        """Read a few images and captions, for the pictures that evaluate() logs."""
        if not isinstance(self.batches, Batches) or not (self.evals or self.cfg.eval_every):
            return None
        from glimpse.run.reports.pictures import read_examples

        return read_examples(self.batches.shards)

    def evaluate(self) -> None:
        """Evaluate the student, and the teacher if the method has one.

        Also logs a picture of the masks and the attention on example images.
        """
        from glimpse.run.evals import evaluate
        from glimpse.run.evals.embed import Embedder
        from glimpse.run.reports.pictures import build_gallery, tile_gallery

        trainer, step = self.trainer, self.trainer.ds.global_steps
        if self.examples:
            columns = build_gallery(trainer.method, self.cfg, self.tokenizer, *self.examples)
            self.log.add_image("masks", tile_gallery(columns), trainer.samples)

        has_teacher = bool(trainer.method.ema_pairs())
        for weights in ("student", "teacher") if has_teacher else ("student",):
            model = Embedder(
                trainer.method,
                self.cfg,
                self.tokenizer,
                results_folder=self.run_folder,
                tag=f"training-{step}",
                weights=weights,
                log=self.log.info,
            )
            # Delete features that a killed job left for this step: its weights may differ from
            # these by rounding.
            model.delete_features()
            results = evaluate(model, self.evals)
            self.log.record_evaluation(step, trainer.samples, results, weights)
            model.delete_features()


def is_due(every: int, samples: int, batch: int) -> bool:
    """Return True if this step crossed a multiple of `every` samples."""
    return every > 0 and samples // every > (samples - batch) // every


def check_finite(value: float, step: int, run_folder: Path) -> None:
    """Raise ValueError if a loss or gradient norm is infinite or nan."""
    if not abs(value) < float("inf"):
        raise ValueError(
            f"the loss or its gradient is {value} at step {step}; lower optim.lr, set optim.clip or"
            " lengthen optim.warmup, and continue with --resume from the newest checkpoint in"
            f" {run_folder}/checkpoints"
        )


def describe_run(cfg: RunConfig, trainer: engine.Engine, batches: Batches | Stream) -> str:
    """Describe the run in one line: masks, model size, ranks, precision, data and steps."""
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
