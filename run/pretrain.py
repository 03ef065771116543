"""Pretrain a vision-language model.

    deepspeed --num_accelerators 2 run/pretrain.py --config run/configs/quickstart.yaml
    deepspeed --hostfile hostfile  run/pretrain.py --config run/configs/flip_l16.yaml --set
    run=runs/mine batch=16384

    python run/pretrain.py --plan --ranks 256 --device H100 --config run/configs/flip_h14.yaml
        what it would cost; trains nothing

The run folder is refused if it exists, unless --resume goes on with it: from its newest whole
checkpoint, on any number of ranks.
"""

import sys
import time
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from glimpse.data.batches import Batches
from glimpse.data.shards import Shards
from glimpse.data.stream import Stream, is_stream
from glimpse.run.evals import evaluate, parse
from glimpse.run.evals.embed import Embedder
from glimpse.run.lib import checkpoint, elastic, engine, folder, plan, ranks, starts
from glimpse.run.lib.config import Run, reader, training_arguments
from glimpse.run.lib.log import Log, peak_flops
from glimpse.run.lib.pictures import examples, gallery, masked_inputs, sheet


def main() -> None:
    cfg, args = training_arguments(__doc__)
    if args.plan:
        print(planned(cfg, args))
        return
    resume = args.resume
    # say what is wrong with the JSON or the batch before anything starts
    engine.merged(cfg, ranks.world())
    home = folder.check(Path(cfg.run), resume)
    ranks.start()
    if resume:
        ranks.once(lambda: ranks.rank() or folder.hold(home))
    evals = ranks.once(lambda: parse(cfg.evals, training=True, data=cfg.eval_data))
    batches = loader(cfg)
    trainer, found = restore(cfg, home, resume, batches)
    batches.begin(found.get("shards", 0))
    ranks.once(lambda: folder.open_folder(home, cfg, trainer.samples, resume))
    log = Log(
        home,
        ranks.rank(),
        trainer.ds.global_steps + (cfg.samples - trainer.samples) // cfg.batch,
        cfg.batch,
    )
    log.say(folder.headline(cfg, trainer, batches))
    try:
        train(cfg, home, batches, trainer, evals, log)
    finally:
        log.close()


def planned(cfg: Run, args) -> str:
    """What --plan prints: the config's own plan, and the cheapest way that fits."""
    cluster = plan.Cluster.asked(args)
    own = plan.described(plan.plan(cfg, cluster, args.caption))
    return f"{own}\n\n{plan.advice(cfg, plan.propose(cfg, cluster, args.caption))}"


def loader(cfg: Run) -> Batches | Stream:
    """This rank's batches: by position from indexed folders, front to back from streams."""
    rows = reader(cfg)
    share = dict(batch=cfg.batch, accumulate=cfg.accumulate, rank=ranks.rank(), world=ranks.world())
    if is_stream(cfg.data.train):
        return Stream(rows, cfg.data.train, **share)
    # rank 0 makes an index where there is none
    return Batches(rows, ranks.once(lambda: Shards(cfg.data.train)), **share)


def identity(cfg: Run, batches: Batches | Stream) -> dict:
    """What a checkpoint and the run that goes on from it have in common."""
    return checkpoint.identity(cfg, batches.reader.tokenizer.fingerprint, batches.fingerprint())


def restore(
    cfg: Run, home: Path, resume: bool, batches: Batches | Stream
) -> tuple[engine.Engine, dict]:
    """The engine at the beginning of the run, or where its newest whole checkpoint left it, and
    that checkpoint's manifest.
    """
    tokenizer = batches.reader.tokenizer
    found = ranks.told(
        lambda: str((checkpoint.whole(home / "checkpoints") or [""])[0]) if resume else ""
    )
    if not found:
        return (
            engine.Engine(
                cfg, tokenizer.vocab_size, load=starts.beginning(cfg.init, tokenizer.fingerprint)
            ),
            {},
        )
    path = Path(found)
    checkpoint.check_identity(path, identity(cfg, batches))
    checkpoint.check_memory(path, engine.merged(cfg, ranks.world()))
    universal = elastic.prepare_elastic(path, ranks.world())
    trainer = engine.Engine(cfg, tokenizer.vocab_size, universal=universal is not None)
    return trainer, elastic.resume(trainer, path, universal)


def train(
    cfg: Run, home: Path, batches: Batches | Stream, trainer: engine.Engine, evals: list, log: Log
) -> None:
    """Update, report, evaluate, save, until the samples are spent or someone asks to stop."""
    stop, audit = ranks.Stop(), folder.Audit(home, ranks.rank(), cfg.data, log.warn)
    tokenizer = batches.reader.tokenizer

    def save() -> Path:
        finite(float(loss), step, home)  # a checkpoint of nan would push the good ones out
        finite(trainer.grad_norm() or 0.0, step, home)
        state = dict(identity=identity(cfg, batches), shards=ranks.least(batches.position()))
        return checkpoint.save(trainer, home / "checkpoints", state, cfg.keep)

    def look(step: int) -> None:
        """A picture of what masks keep and the model attends to, and the evaluations."""
        if watched:
            log.picture(
                "masks", sheet(gallery(trainer.method, cfg, tokenizer, *watched)), trainer.samples
            )
        for weights in ["student"] + ["teacher"] * bool(trainer.method.averaged()):
            model = Embedder(
                trainer.method,
                cfg,
                tokenizer,
                home=home,
                tag=f"training-{step}",
                weights=weights,
                say=log.say,
            )
            # what a job left that was broken off here: its weights may have been others by a
            # rounding
            model.forget()
            log.evaluation(step, trainer.samples, evaluate(model, evals), weights)
            model.forget()

    watched = (
        examples(batches.shards)
        if isinstance(batches, Batches) and (evals or cfg.eval_every)
        else None
    )
    peak = peak_flops() * ranks.world()
    stream = batches.stream(
        range(trainer.samples, cfg.samples - cfg.batch + 1, cfg.batch),
        pin=ranks.device().type == "cuda",
    )
    saved = trainer.samples
    while trainer.samples + cfg.batch <= cfg.samples and not stop.asked():
        begin = time.perf_counter()
        parts = next(stream)
        log.wait(time.perf_counter() - begin)
        audit(batches, parts, trainer.samples + cfg.batch)
        lr = cfg.optim.rate(trainer.samples, cfg.batch, cfg.samples)
        loss, metrics = trainer.step(parts, lr)
        step = trainer.ds.global_steps
        if step == 1:
            log.picture("masked inputs", masked_inputs(parts[0], cfg), trainer.samples)
        if step % cfg.log_every == 0 or step in (1, log.steps):
            finite(float(loss), step, home)
            values = dict(
                loss=loss,
                lr=lr,
                grad_norm=trainer.grad_norm(),
                bad=ranks.total(torch.tensor(audit.bad)),
                **metrics,
            )
            log.step(step, trainer.samples, trainer.method.flops(parts[0]), peak, **values)
        if due(cfg.save_every, trainer.samples, cfg.batch):
            log.say(f"saved {save()}")
            saved = trainer.samples
        if (
            due(cfg.eval_every, trainer.samples, cfg.batch)
            and trainer.samples + cfg.batch <= cfg.samples
        ):
            look(step)
    if saved < trainer.samples:
        log.say(f"saved {save()}")
    if trainer.samples + cfg.batch <= cfg.samples:
        log.say(f"asked to stop after {trainer.samples} samples; go on with --resume")
    elif evals:
        look(trainer.ds.global_steps)


def due(every: int, samples: int, batch: int) -> bool:
    """Has this step crossed a multiple of `every` samples?"""
    return every > 0 and samples // every > (samples - batch) // every


def finite(loss: float, step: int, home: Path) -> None:
    if not abs(loss) < float("inf"):
        raise ValueError(
            f"the loss or its gradient is {loss} at step {step}; nothing was saved since"
            f" {home}/checkpoints' newest; lower optim.lr, set optim.clip, or lengthen"
            " optim.warmup, and go on with --resume"
        )


if __name__ == "__main__":
    ranks.run_script(main)
