"""Training goes on from a checkpoint: on as many ranks as wrote it, or on any other number through
DeepSpeed's universal format.

    universal = prepare_elastic(path, world())
        converted beside the checkpoint where the number changed, else None
    engine = Engine(cfg, vocab, universal=universal is not None)
    manifest = resume(engine, path, universal)
        weights, optimizer, averages; the converted copy is gone again

What the format drops (frozen parameters, the teacher's fp32 averages) is carried over here, from
the checkpoint itself. DeepSpeed opens whole files of which it then takes parts, so it does all of
this with files mapped: a process holds its own state and a tensor or two.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from deepspeed.checkpoint import ds_to_universal
from torch.utils.serialization import config as serialization

from glimpse.run.lib.distributed import barrier, once, rank, say
from glimpse.run.train.checkpoint import AVERAGE, manifest
from glimpse.run.train.engine import Engine
from glimpse.run.train.load_model import load

GB = 1e9


def prepare_elastic(path: Path, ranks: int) -> Path | None:
    """Where the rank count changed: the checkpoint in DeepSpeed's universal format, converted by
    rank 0; else None.

    Whatever an earlier job left half converted is removed. The other ranks wait as long as it
    takes.
    """
    found, target = manifest(path), path.with_name(f"universal-{path.name}")
    changed = found["ranks"] != ranks and found["stage"] > 0

    def prepare() -> None:
        remove(path.parent)
        if changed:
            say(f"{path}: written by {found['ranks']} ranks, made to fit {ranks}")
            convert(path, target)

    once(lambda: rank() or prepare())
    return target if changed else None


def remove(folder: Path) -> None:
    """No converted copy under RUN/checkpoints."""
    for left in folder.glob("universal-*"):
        shutil.rmtree(left)
    (folder / "latest_universal").unlink(missing_ok=True)


def room(path: Path) -> int:
    """The bytes that a conversion takes at most: the optimizer's state in pieces and in whole
    tensors, one rank's share of it, the rest.
    """
    sizes = {file.name: file.stat().st_size for file in path.glob("*_states.pt")}
    optimizer = [size for name, size in sizes.items() if name.endswith("_optim_states.pt")]
    return sum(sizes.values()) + sum(optimizer) + max(optimizer)


def convert(path: Path, target: Path) -> None:
    """Write the universal copy.

    In this process, so that nothing goes on writing once the job was killed.
    """
    needed, free = room(path), shutil.disk_usage(path).free
    if free < needed:
        raise OSError(
            f"{path}: another number of ranks needs a copy of {needed / GB:.1f} GB beside it for a"
            f" while, the disk has {free / GB:.1f} GB; make room, or go on on"
            f" {manifest(path)['ranks']} ranks"
        )
    how = SimpleNamespace(
        input_folder=str(path),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        # as its command line would say
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        # it says much
        with (
            mapped(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            ds_to_universal.main(how)
    except Exception as error:
        remove(path.parent)
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path}: conversion to the universal format failed: {first}") from error


def mapped() -> contextlib.AbstractContextManager:
    """torch.load maps files into memory, of which only what is used is read; torch.save sums
    nothing up, which takes half of the time.
    """
    return serialization.patch({"load.mmap": True, "save.compute_crc32": False})


def resume(engine: Engine, path: Path, universal: Path | None) -> dict:
    """Load a checkpoint (its universal form where the rank count changed) into the engine and
    return its manifest.
    """
    found = manifest(path)
    if universal:
        with mapped(), paddings(engine):
            engine.restore(universal, found)
        averaged = {id(teacher) for teacher, _ in engine.average.pairs.values()}
        frozen = {
            name: name
            for name, p in engine.method.named_parameters()
            if not p.requires_grad and id(p) not in averaged
        }
        if frozen:
            load(engine.method, path, frozen)
        barrier()
        if rank() == 0:
            remove(path.parent)
    else:
        engine.restore(path, found)
    if engine.average.pairs:
        read_average(engine, path, found)
    engine.exact_temperature()
    return found


@contextlib.contextmanager
def paddings(engine: Engine) -> Iterator[None]:
    """Let the universal format be loaded in stages 1 and 2 where a rank's share of a parameter
    group is padding alone.

    DeepSpeed asks the first of the group's parameters that this rank has a part of; one then stands
    in that has nothing to load.
    """
    groups = getattr(engine.ds.optimizer, "bit16_groups", [])
    absent = [
        group[0] for group in groups if all(parameter._hp_mapping is None for parameter in group)
    ]
    for parameter in absent:
        parameter._hp_mapping = SimpleNamespace(get_optim_state_keys=list)
        parameter.load_hp_checkpoint_state = lambda *_, **__: None
    yield
    for parameter in absent:
        parameter._hp_mapping = None


def read_average(engine: Engine, path: Path, found: dict) -> None:
    """This rank's part of the teacher's averages, out of the parts that so many ranks once wrote;
    it opens only those that it needs.

    ZeRO-3 lays shards of one size end to end and pads the last.
    """
    count = found["ranks"] if engine.stage == 3 else 1
    file = cache(
        lambda i: torch.load(
            path / AVERAGE.format(i), map_location="cpu", mmap=True, weights_only=True
        )
    )
    mine = rank() if engine.stage == 3 else 0
    for name, kept in engine.average.kept.items():
        first, size = mine * len(kept), len(file(min(mine, count - 1))[name])
        for i in range(first // size, min(count, -(-(first + len(kept)) // size))):
            begin = i * size - first  # where that part would lie in ours
            piece = file(i)[name][max(0, -begin) : len(kept) - begin]
            kept[max(0, begin) :][: len(piece)].copy_(piece)
    engine.average.write()
