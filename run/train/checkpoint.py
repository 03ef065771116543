"""Checkpoints that are complete or do not count, and that any number of ranks can resume from.

    RUN/checkpoints/step-00001000/      DeepSpeed's files, one or two a rank, and manifest.json
    manifest.json                       written last: step, samples, ranks, ZeRO stage, what was
                                        trained, and every file's size

A folder counts only with a manifest that fits its files, so a job may die at any moment:
DeepSpeed's own `latest` is written before the other ranks are done. run/train/elastic.py resumes
training from one; run/train/load_model.py opens its weights for everything else.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from glimpse.run.lib.config import RunConfig, tuples_to_lists
from glimpse.run.lib.distributed import barrier, rank, world_size
from glimpse.run.train.engine import Engine

# a rank's part of the teacher in fp32; all of it on rank 0 where the stage is below 3
AVERAGE_FILE = "average_rank_{:05d}.pt"


def identity(cfg: RunConfig, tokenizer: str, data: dict | None = None) -> dict:
    """Return everything that must agree to go on from a checkpoint.

    The architecture, the method and its options, the vocabulary; in training also the data and
    their order.
    """
    model = tuples_to_lists(asdict(cfg.model))
    del model["checkpoint_activations"]
    settings = dict(
        method=cfg.method,
        options=tuples_to_lists(asdict(cfg.options)),
        model=model,
        context=cfg.data.context,
        tokenizer=tokenizer,
    )
    if data:
        settings["data"] = data
    return settings


def save(engine: Engine, folder: Path, state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-N and commit it; then delete all but the newest `keep`.

    All ranks must call.
    """
    tag = f"step-{engine.ds.global_steps:08d}"
    path = folder / tag
    if rank() == 0 and path.exists():
        # It is incomplete: a complete one of this step would have been resumed from.
        shutil.rmtree(path)
    barrier()

    # Every rank writes its shards.
    engine.ds.save_checkpoint(str(folder), tag=tag, client_state={}, save_latest=False)
    if engine.averages.pairs and (engine.stage == 3 or rank() == 0):
        averages = {name: average.clone() for name, average in engine.averages.kept.items()}
        torch.save(averages, path / AVERAGE_FILE.format(rank()))
    barrier()

    # Rank 0 commits the checkpoint once all of them are on disk, and deletes old ones.
    if rank() == 0:
        check_shards(engine, path)
        write_manifest(engine, path, state)
        for old in complete_checkpoints(folder)[keep:]:
            (old / "manifest.json").unlink()  # first: half a deletion must not look whole
            shutil.rmtree(old)
    barrier()
    return path


def check_shards(engine: Engine, path: Path) -> None:
    """Raise OSError if the files of other ranks are not there."""
    shards = len(list(path.glob("*_optim_states.pt")))
    if engine.stage and shards != world_size():
        raise OSError(
            f"{path}: {shards} of {world_size()} ranks' shards are there; is it on a file system"
            " that all machines share?"
        )
    due = 0
    if engine.averages.pairs:
        due = world_size() if engine.stage == 3 else 1
    parts = len(list(path.glob("average_rank_*.pt")))
    if parts != due:
        raise OSError(
            f"{path}: {parts} of {due} parts of the teacher are there; is it on a file system that"
            " all machines share?"
        )


def write_manifest(engine: Engine, path: Path, state: dict) -> None:
    """Flush every file of a checkpoint to disk, then write its manifest."""
    sizes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    for name in sizes:
        fsync(path / name)
    counts = dict(
        step=engine.ds.global_steps,
        samples=engine.samples,
        ranks=world_size(),
        stage=engine.stage,
        bf16=engine.bf16,
    )
    part = path / "manifest.json.part"
    tree = dict(state, **counts, files=sizes)
    part.write_text(json.dumps(tree, indent=1))
    fsync(part)
    os.replace(part, path / "manifest.json")
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints under RUN/checkpoints, the newest first."""
    return [
        path for path in sorted(folder.glob("step-*"), reverse=True) if manifest_if_complete(path)
    ]


def manifest_if_complete(path: Path) -> dict | None:
    """Return the manifest of a complete checkpoint, or None.

    None if there is no manifest, or it does not fit the files.
    """
    try:
        tree = json.loads((path / "manifest.json").read_text())
        sizes = tree["files"].items()
        fits = all((path / name).stat().st_size == size for name, size in sizes)
    # missing, incomplete, or the manifest of something else
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return tree if fits else None


def read_manifest(path: Path) -> dict:
    """Return the manifest of a complete checkpoint, or raise ValueError.

    ValueError if there is no manifest, or it does not fit the files.
    """
    tree = manifest_if_complete(path)
    if tree is not None:
        return tree
    if flaw := describe_damage(path):
        raise ValueError(f"{path}: {flaw}: damaged, or still being copied")
    raise ValueError(f"{path}: no whole checkpoint; its manifest.json is missing or incomplete")


def describe_damage(path: Path) -> str:
    """Describe the first file whose size differs from the manifest.

    Returns "" if all match or there is no manifest.
    """
    try:
        sizes = json.loads((path / "manifest.json").read_text())["files"].items()
        for name, size in sizes:
            file = path / name
            if not file.is_file():
                return f"{name} is missing, {size:,} were saved"
            actual = file.stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes, {size:,} were saved"
    # missing, incomplete, or the manifest of something else
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return ""


def newest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run folder, or a checkpoint itself.

    Raises ValueError where that is damaged, instead of returning an older one silently.
    """
    if run.resolve().name == "checkpoints" and (run / "../config.yaml").exists():
        run = run.resolve().parent
    if (run / "manifest.json").exists():
        steps = [run]
    else:
        steps = sorted(run.glob("checkpoints/step-*"), reverse=True)
    for path in steps:
        if manifest_if_complete(path):
            return path.resolve()
        if flaw := describe_damage(path):
            older = complete_checkpoints(path.parent)
            advice = ""
            if older and path != run:
                advice = f"; {older[0]} is whole and may be named instead"
            raise ValueError(f"{path}: {flaw}: damaged, or still being copied{advice}")
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    raise ValueError(
        f"{run}: no whole checkpoint in it; a run folder has checkpoints/step-*/manifest.json"
    )


def check_identity(path: Path, expected: dict) -> None:
    """Raise ValueError naming the first thing of `expected` in which the checkpoint differs."""
    saved_identity = read_manifest(path)["identity"]
    common = {key: saved_identity.get(key) for key in expected}
    for key, was, now in differences(common, expected):
        raise ValueError(
            f"{path} was trained with {key}: {was!r}, this config says {now!r}; use the run's own"
            " config.yaml"
        )


def check_zero_settings(path: Path, tree: dict) -> None:
    """Raise ValueError if the DeepSpeed JSON has another ZeRO stage or precision than the run.

    The checkpoint's files would not fit.
    """
    saved_manifest = read_manifest(path)
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    bf16 = bool(tree.get("bf16", {}).get("enabled"))
    was = describe_zero_settings(saved_manifest["stage"], saved_manifest["bf16"])
    now = describe_zero_settings(stage, bf16)
    if was != now:
        raise ValueError(
            f"{path} was trained with {was}, this DeepSpeed JSON says {now}; go on with the old, or"
            " start a new run from its weights with `init:`"
        )


def describe_zero_settings(stage: int, bf16: bool) -> str:
    return f"ZeRO stage {stage} in {'bf16' if bf16 else 'fp32'}"


def differences(was, now, where: str = "") -> Iterator[tuple]:
    """Yield (key, value before, value now) of all that differs between two trees of mappings."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from differences(was.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif was != now:
        yield where, was, now
