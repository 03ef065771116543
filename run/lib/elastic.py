"""Training goes on from a checkpoint: on as many ranks as wrote it, or on any other number through DeepSpeed's universal format.

    universal = prepare_elastic(path, world())                  converted beside the checkpoint where the number changed, else None
    engine = Engine(cfg, vocab, universal=universal is not None)
    manifest = resume(engine, path, universal)                  weights, optimizer, averages; the converted copy is gone again

What the format drops (frozen parameters, the teacher's fp32 averages) is carried over here, from the checkpoint itself.
"""
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch

from run.lib.checkpoint import AVERAGE, manifest
from run.lib.engine import Engine
from run.lib.models import load
from run.lib.ranks import barrier, rank, store


def prepare_elastic(path: Path, ranks: int) -> Path | None:
    """Where the rank count changed: the checkpoint in DeepSpeed's universal format, converted by rank 0; else None.

    The other ranks wait at the store, where hours of conversion time no collective out.
    """
    found = manifest(path)
    if found["ranks"] == ranks or found["stage"] == 0:
        return None
    target = path.with_name(f"universal-{path.name}")
    if rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", path, "--output_folder", target,
                   "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=alone)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{path}: conversion to the universal format failed: {last}")
        (path.parent / "latest_universal").unlink(missing_ok=True)
        store().set("converted", "1")
    store().wait(["converted"], timedelta(hours=12))
    return target


def resume(engine: Engine, path: Path, universal: Path | None) -> dict:
    """Load a checkpoint (its universal form where the rank count changed) into the engine and return its manifest."""
    found = manifest(path)
    engine.restore(universal or path, found)
    if universal:
        frozen = {name: name for name, p in engine.method.named_parameters() if not p.requires_grad}
        if frozen:
            load(engine.method, path, frozen)
        barrier()
        if rank() == 0:
            shutil.rmtree(universal)
    if engine.average.pairs:
        read_average(engine, path, found)
    engine.exact_temperature()
    return found


def read_average(engine: Engine, path: Path, found: dict) -> None:
    """This rank's part of the teacher's averages, out of the parts that so many ranks once wrote; it opens only those that it needs.

    ZeRO-3 lays shards of one size end to end and pads the last.
    """
    count = found["ranks"] if engine.stage == 3 else 1
    file = cache(lambda i: torch.load(path / AVERAGE.format(i), map_location="cpu", mmap=True, weights_only=True))
    mine = rank() if engine.stage == 3 else 0
    for name, kept in engine.average.kept.items():
        first, size = mine * len(kept), len(file(min(mine, count - 1))[name])
        for i in range(first // size, min(count, -(-(first + len(kept)) // size))):
            begin = i * size - first  # where that part would lie in ours
            piece = file(i)[name][max(0, -begin):len(kept) - begin]
            kept[max(0, begin):][:len(piece)].copy_(piece)
    engine.average.write()
