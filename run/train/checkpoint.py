"""Checkpoints that are whole or not there, and that any number of ranks can go on from.

    RUN/checkpoints/step-00001000/      DeepSpeed's files, one or two a rank, and manifest.json
    manifest.json                       written last: step, samples, ranks, ZeRO stage, what was
                                        trained, and every file's size

A folder counts only with a manifest that fits its files, so a job may die at any moment:
DeepSpeed's own `latest` is written before
the other ranks are done.  How training goes on from one is run/train/elastic.py's; what else
may be done with its weights, run/train/load_model.py's.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from glimpse.run.lib.config import Run, plain
from glimpse.run.lib.distributed import barrier, rank, world
from glimpse.run.train.engine import Engine

# a rank's part of the teacher in fp32; all of it on rank 0 where the stage is below 3
AVERAGE = "average_rank_{:05d}.pt"


def identity(cfg: Run, tokenizer: str, data: dict | None = None) -> dict:
    """What must agree to go on: the architecture, the method and its options, the vocabulary; in
    training also the data and their order.
    """
    model = {
        key: value
        for key, value in plain(asdict(cfg.model)).items()
        if key != "checkpoint_activations"
    }
    same = dict(
        method=cfg.method,
        options=plain(asdict(cfg.options)),
        model=model,
        context=cfg.data.context,
        tokenizer=tokenizer,
    )
    return same | ({"data": data} if data else {})


def save(engine: Engine, folder: Path, state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-N and commit it; then delete all but the newest `keep`.

    All ranks must call.
    """
    tag = f"step-{engine.ds.global_steps:08d}"
    path = folder / tag
    if rank() == 0 and path.exists():
        shutil.rmtree(path)  # torn: a whole one of this step would have been resumed from
    barrier()
    engine.ds.save_checkpoint(str(folder), tag=tag, client_state={}, save_latest=False)
    if engine.average.pairs and (engine.stage == 3 or rank() == 0):
        torch.save(
            {name: kept.clone() for name, kept in engine.average.kept.items()},
            path / AVERAGE.format(rank()),
        )
    barrier()
    if rank() == 0:
        shards = len(list(path.glob("*_optim_states.pt")))
        if engine.stage and shards != world():
            raise OSError(
                f"{path}: {shards} of {world()} ranks' shards are there; is it on a file system"
                " that all machines share?"
            )
        parts, due = (
            len(list(path.glob("average_rank_*.pt"))),
            (world() if engine.stage == 3 else 1) * bool(engine.average.pairs),
        )
        if parts != due:
            raise OSError(
                f"{path}: {parts} of {due} parts of the teacher are there; is it on a file system"
                " that all machines share?"
            )
        files = {
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        for name in files:
            sync(path / name)
        counts = dict(
            step=engine.ds.global_steps,
            samples=engine.samples,
            ranks=world(),
            stage=engine.stage,
            bf16=engine.bf16,
        )
        manifest = dict(state, **counts, files=files)
        part = path / "manifest.json.part"
        part.write_text(json.dumps(manifest, indent=1))
        sync(part)
        os.replace(part, path / "manifest.json")
        sync(path)
        for old in whole(folder)[keep:]:
            (old / "manifest.json").unlink()  # first: half a deletion must not look whole
            shutil.rmtree(old)
    barrier()
    return path


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def whole(folder: Path) -> list[Path]:
    """The checkpoints under RUN/checkpoints whose manifest fits their files, the newest first."""
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if manifest(path)]


def manifest(path: Path) -> dict | None:
    try:
        found = json.loads((path / "manifest.json").read_text())
        fits = all((path / name).stat().st_size == size for name, size in found["files"].items())
    # none, torn, or something else's
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if fits else None


def damage(path: Path) -> str:
    """Which file of a checkpoint that was once whole is not as it was saved; "" where none is, or
    it never was one of ours.
    """
    try:
        files = json.loads((path / "manifest.json").read_text())["files"].items()
        for name, size in files:
            there = (path / name).stat().st_size if (path / name).is_file() else None
            if there != size:
                return (
                    f"{name} {'is missing' if there is None else f'has {there:,} bytes'}, {size:,}"
                    " were saved"
                )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return ""


def newest(run: Path) -> Path:
    """The newest checkpoint of a run folder, or a checkpoint itself; ValueError where that is
    damaged, not silently an older one.
    """
    if run.resolve().name == "checkpoints" and (run / "../config.yaml").exists():
        run = run.resolve().parent
    steps = (
        [run]
        if (run / "manifest.json").exists()
        else sorted(run.glob("checkpoints/step-*"), reverse=True)
    )
    for path in steps:
        if manifest(path):
            return path.resolve()
        if flaw := damage(path):
            older = whole(path.parent)
            advice = (
                f"; {older[0]} is whole and may be named instead" if older and path != run else ""
            )
            raise ValueError(f"{path}: {flaw}: damaged, or still being copied{advice}")
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    raise ValueError(
        f"{run}: no whole checkpoint in it; a run folder has checkpoints/step-*/manifest.json"
    )


def check_identity(path: Path, mine: dict) -> None:
    """ValueError naming the first thing of `mine` in which the checkpoint differs."""
    found = manifest(path)["identity"]
    for key, was, now in differences({key: found.get(key) for key in mine}, mine):
        raise ValueError(
            f"{path} was trained with {key}: {was!r}, this config says {now!r}; use the run's own"
            " config.yaml"
        )


def check_memory(path: Path, tree: dict) -> None:
    """ValueError if the DeepSpeed JSON spends memory otherwise than the checkpoint's run: its files
    would not fit.
    """
    found = manifest(path)
    mine = (
        tree.get("zero_optimization", {}).get("stage", 0),
        bool(tree.get("bf16", {}).get("enabled")),
    )
    was, now = (
        f"ZeRO stage {stage} in {'bf16' if bf16 else 'fp32'}"
        for stage, bf16 in ((found["stage"], found["bf16"]), mine)
    )
    if was != now:
        raise ValueError(
            f"{path} was trained with {was}, this DeepSpeed JSON says {now}; "
            "go on with the old, or start a new run from its weights with `init:`"
        )


def differences(was, now, where: str = "") -> Iterator[tuple]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif was != now:
        yield where, was, now
