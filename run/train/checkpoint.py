"""Write, validate and find checkpoints.

    RUN/checkpoints/step-00001000/      DeepSpeed's files, one or two per rank, and manifest.json
    manifest.json                       step, samples, ranks, ZeRO stage, the run's identity, and
                                        the size of every file

The manifest is written last. A checkpoint without one, or with files of other sizes, is incomplete
and ignored, so a job may be killed at any moment. (DeepSpeed's own `latest` file is written before
the other ranks have finished.)

run/train/elastic.py resumes training from a checkpoint on any number of ranks;
run/train/load_model.py reads its weights for everything else.
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

# A rank's shard of the teacher's fp32 averages. Below ZeRO-3 rank 0 writes a single file.
AVERAGE_FILE = "average_rank_{:05d}.pt"


def identity(cfg: RunConfig, tokenizer: str, data: dict | None = None) -> dict:
    """Return the settings that must be equal for a run to resume from a checkpoint.

    These are the architecture, the method and its options, and the vocabulary; for training also
    the data and their order. tokenizer: its fingerprint. data: the fingerprint of the shards.
    """
    model = tuples_to_lists(asdict(cfg.model))
    del model["checkpoint_activations"]  # changes memory and speed only
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
    """Write RUN/checkpoints/step-N, and delete all but the newest `keep` checkpoints.

    state: added to the manifest. All ranks must call.
    """
    tag = f"step-{engine.ds.global_steps:08d}"
    path = folder / tag
    if rank() == 0 and path.exists():
        # It must be incomplete: the run would have resumed from a complete checkpoint of this step.
        shutil.rmtree(path)
    barrier()

    # 1. Every rank writes its shards.
    engine.ds.save_checkpoint(str(folder), tag=tag, client_state={}, save_latest=False)
    if engine.averages.pairs and (engine.stage == 3 or rank() == 0):
        # clone(): torch.save would write the full storage of a view
        averages = {name: average.clone() for name, average in engine.averages.values.items()}
        torch.save(averages, path / AVERAGE_FILE.format(rank()))
    barrier()

    # 2. All files are on disk. Rank 0 completes the checkpoint and deletes old ones.
    if rank() == 0:
        check_shards(engine, path)
        write_manifest(engine, path, state)
        for old in complete_checkpoints(folder)[keep:]:
            # The manifest first: a checkpoint that is half deleted must not look complete.
            (old / "manifest.json").unlink()
            shutil.rmtree(old)
    barrier()
    return path


def check_shards(engine: Engine, path: Path) -> None:
    """Raise OSError if rank 0 cannot see the files that the other ranks wrote."""
    advice = "put the run folder on a file system that all machines share"
    shards = len(list(path.glob("*_optim_states.pt")))
    if engine.stage and shards != world_size():
        raise OSError(f"{path}: found the shards of {shards} of {world_size()} ranks; {advice}")

    expected = 0
    if engine.averages.pairs:
        expected = world_size() if engine.stage == 3 else 1
    average_files = len(list(path.glob("average_rank_*.pt")))
    if average_files != expected:
        raise OSError(
            f"{path}: found {average_files} of {expected} files of the teacher's averages; {advice}"
        )


def write_manifest(engine: Engine, path: Path, state: dict) -> None:
    """Flush every file of a checkpoint to disk, then write its manifest."""
    # 1. The data first: after a power failure, a manifest must not describe files that are lost.
    sizes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            sizes[file.relative_to(path).as_posix()] = file.stat().st_size
    for name in sizes:
        fsync(path / name)

    # 2. The manifest, under its final name only when it is complete.
    counts = dict(
        step=engine.ds.global_steps,
        samples=engine.samples,
        ranks=world_size(),
        stage=engine.stage,
        bf16=engine.bf16,
    )
    manifest = dict(state, **counts, files=sizes)
    temporary = path / "manifest.json.part"
    temporary.write_text(json.dumps(manifest, indent=1))
    fsync(temporary)
    os.replace(temporary, path / "manifest.json")
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints under RUN/checkpoints, the newest first."""
    paths = sorted(folder.glob("step-*"), reverse=True)
    return [path for path in paths if manifest_if_complete(path)]


def manifest_if_complete(path: Path) -> dict | None:
    """Return the manifest of a checkpoint, or None if it is missing or does not match the files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        sizes = manifest["files"].items()
        matches = all((path / name).stat().st_size == size for name, size in sizes)
    # no manifest, part of one, or a manifest.json of another program
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return manifest if matches else None


def read_manifest(path: Path) -> dict:
    """Return the manifest of a checkpoint, or raise ValueError if the checkpoint is incomplete."""
    manifest = manifest_if_complete(path)
    if manifest is not None:
        return manifest
    if damage := describe_damage(path):
        raise ValueError(f"{path}: {damage}: damaged, or still being copied")
    raise ValueError(f"{path}: no complete checkpoint; its manifest.json is missing or incomplete")


def describe_damage(path: Path) -> str:
    """Describe the first file whose size differs from the manifest.

    Returns "" if all match or there is no manifest.
    """
    try:
        sizes = json.loads((path / "manifest.json").read_text())["files"].items()
        for name, size in sizes:
            file = path / name
            if not file.is_file():
                return f"{name} is missing, {size:,} bytes were saved"
            actual = file.stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes, {size:,} were saved"
    # no manifest, part of one, or a manifest.json of another program
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return ""


def newest_checkpoint(run: Path) -> Path:
    """Return the newest complete checkpoint of a run folder; `run` may be a checkpoint itself.

    Raises ValueError if a newer one is damaged, because an older one would be used silently.
    Checkpoints without a manifest are skipped: their save was interrupted.
    """
    if run.resolve().name == "checkpoints" and (run / "../config.yaml").exists():
        run = run.resolve().parent
    if (run / "manifest.json").exists():
        candidates = [run]
    else:
        candidates = sorted(run.glob("checkpoints/step-*"), reverse=True)

    for path in candidates:
        if manifest_if_complete(path):
            return path.resolve()
        if damage := describe_damage(path):
            older = complete_checkpoints(path.parent)
            advice = ""
            if older and path != run:
                advice = f"; {older[0]} is complete: pass it to use it instead"
            raise ValueError(f"{path}: {damage}: damaged, or still being copied{advice}")

    if not run.is_dir():
        raise ValueError(f"{run}: no such folder")
    raise ValueError(
        f"{run}: no complete checkpoint in it; a run folder has checkpoints/step-*/manifest.json"
    )


def check_identity(path: Path, expected: dict) -> None:
    """Raise ValueError with the first key of `expected` in which the checkpoint differs."""
    saved_identity = read_manifest(path)["identity"]
    # Only common keys: evaluations expect an identity without the data.
    common = {key: saved_identity.get(key) for key in expected}
    for key, saved, current in differences(common, expected):
        raise ValueError(
            f"{path}: trained with {key}: {saved!r}, but this config has {current!r}; use the run's"
            " own config.yaml"
        )


def check_zero_settings(path: Path, ds_config: dict) -> None:
    """Raise ValueError if the DeepSpeed JSON has another ZeRO stage or precision than the run.

    DeepSpeed could not load the checkpoint's files.
    """
    manifest = read_manifest(path)
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    bf16 = bool(ds_config.get("bf16", {}).get("enabled"))
    saved = describe_zero_settings(manifest["stage"], manifest["bf16"])
    current = describe_zero_settings(stage, bf16)
    if saved != current:
        raise ValueError(
            f"{path}: trained with {saved}, but this DeepSpeed JSON has {current}; resume with the"
            " old JSON, or start a new run from the weights with `init:`"
        )


def describe_zero_settings(stage: int, bf16: bool) -> str:
    return f"ZeRO stage {stage} in {'bf16' if bf16 else 'fp32'}"


def differences(before, after, key: str = "") -> Iterator[tuple]:
    """Yield (key, value before, value after) of every leaf that differs in two nested dicts."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
    elif before != after:
        yield key, before, after
