"""Resume training from a checkpoint, on any number of ranks.

On as many ranks as wrote it from DeepSpeed's own files, on another number through DeepSpeed's
universal format.

    universal = prepare_elastic(path, world())
        converted beside the checkpoint where the number changed, else None
    engine = Engine(cfg, vocab, universal=universal is not None)
    manifest = resume(engine, path, universal)
        loads weights, optimizer and averages; removes the converted copy

The format drops frozen parameters and the teacher's fp32 averages; they are read here from the
checkpoint itself. DeepSpeed opens whole files of which it then takes parts, so all of this runs
with files mapped into memory: a process holds its own state and a tensor or two.
"""

import contextlib
import io
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from torch.utils.serialization import config as serialization

from glimpse.run.lib.distributed import barrier, print_rank0, rank, rank0_first
from glimpse.run.train.checkpoint import AVERAGE_FILE, read_manifest
from glimpse.run.train.engine import Engine
from glimpse.run.train.load_model import load_weights

GB = 1e9


def prepare_elastic(path: Path, ranks: int) -> Path | None:
    """Convert a checkpoint of another number of ranks to DeepSpeed's universal format.

    Returns the converted copy, or None where the number is the same. Rank 0 converts, and removes
    whatever an earlier job left half converted; the other ranks wait as long as it takes.
    """
    manifest = read_manifest(path)
    target = path.with_name(f"universal-{path.name}")
    changed = manifest["ranks"] != ranks and manifest["stage"] > 0

    def prepare() -> None:
        if rank() != 0:
            return
        remove_universal(path.parent)
        if changed:
            print_rank0(f"{path}: written by {manifest['ranks']} ranks, made to fit {ranks}")
            convert_to_universal(path, target)

    rank0_first(prepare)
    return target if changed else None


def remove_universal(folder: Path) -> None:
    """Remove all converted copies under RUN/checkpoints."""
    for copy in folder.glob("universal-*"):
        shutil.rmtree(copy)
    (folder / "latest_universal").unlink(missing_ok=True)


def conversion_bytes(path: Path) -> int:
    """Return the bytes that a conversion needs at most.

    They hold the optimizer's state in pieces and in whole tensors, one rank's share of it, and the
    rest.
    """
    sizes = {file.name: file.stat().st_size for file in path.glob("*_states.pt")}
    optimizer = [size for name, size in sizes.items() if name.endswith("_optim_states.pt")]
    return sum(sizes.values()) + sum(optimizer) + max(optimizer)


def convert_to_universal(path: Path, target: Path) -> None:
    """Write the universal copy.

    In this process, so that nothing goes on writing when the job is killed.
    """
    # Refuse a disk that would fill up on the way.
    needed = conversion_bytes(path)
    free = shutil.disk_usage(path).free
    if free < needed:
        ranks = read_manifest(path)["ranks"]
        raise OSError(
            f"{path}: another number of ranks needs a copy of {needed / GB:.1f} GB beside it for a"
            f" while, the disk has {free / GB:.1f} GB; make room, or go on on {ranks} ranks"
        )

    # Convert, with the arguments of DeepSpeed's script and its defaults.
    arguments = SimpleNamespace(
        input_folder=str(path),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        # without its many lines of output
        with (
            memory_map_files(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            ds_to_universal.main(arguments)
    except Exception as error:
        remove_universal(path.parent)
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path}: conversion to the universal format failed: {first}") from error


def memory_map_files() -> contextlib.AbstractContextManager:
    """Map files into memory in torch.load, of which only what is used is then read.

    torch.save writes no checksums, which take half of its time.
    """
    # torch adds `patch` to the module when it is imported, which its annotations do not show
    settings: Any = serialization
    return settings.patch({"load.mmap": True, "save.compute_crc32": False})


def resume(engine: Engine, path: Path, universal: Path | None) -> dict:
    """Load a checkpoint into the engine and return its manifest.

    universal: its converted copy, if the number of ranks changed; it is removed.
    """
    manifest = read_manifest(path)
    if universal:
        with memory_map_files(), skip_padding_only_groups(engine):
            engine.restore(universal, manifest)
        load_frozen(engine, path)
        barrier()
        if rank() == 0:
            remove_universal(path.parent)
    else:
        engine.restore(path, manifest)
    if engine.averages.pairs:
        load_averages(engine, path, manifest)
    engine.update_temperature_residuals()
    return manifest


def load_frozen(engine: Engine, path: Path) -> None:
    """Load the frozen parameters, which the universal format drops, but for the averages."""
    averaged = {id(teacher) for teacher, _ in engine.averages.pairs.values()}
    names = {}
    for name, parameter in engine.method.named_parameters():
        if not parameter.requires_grad and id(parameter) not in averaged:
            names[name] = name
    if names:
        load_weights(engine.method, path, names)


@contextlib.contextmanager
def skip_padding_only_groups(engine: Engine) -> Iterator[None]:
    """Let stages 1 and 2 load the universal format where a rank has only padding of a group.

    DeepSpeed looks at the first parameter of the group of which this rank has a part; here one
    stands in that has nothing to load.
    """
    groups = getattr(engine.ds.optimizer, "bit16_groups", [])
    stand_ins = []
    for group in groups:
        if all(parameter._hp_mapping is None for parameter in group):
            stand_ins.append(group[0])
    for parameter in stand_ins:
        parameter._hp_mapping = SimpleNamespace(get_optim_state_keys=list)
        parameter.load_hp_checkpoint_state = lambda *_, **__: None
    yield
    for parameter in stand_ins:
        parameter._hp_mapping = None


def load_averages(engine: Engine, path: Path, manifest: dict) -> None:
    """Read this rank's part of the teacher's averages out of the saved parts of all ranks.

    ZeRO-3 lays shards of one size end to end and pads the last. Only the files of overlapping
    shards are opened. manifest: the checkpoint's manifest.
    """
    sharded = engine.stage == 3
    count = manifest["ranks"] if sharded else 1
    index = rank() if sharded else 0

    @cache
    def shards(i: int) -> dict[str, torch.Tensor]:
        file = path / AVERAGE_FILE.format(i)
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    for name, average in engine.averages.kept.items():
        # This rank's elements of the flat parameter, [first, end), in shards of `size` elements.
        length = len(average)
        size = len(shards(min(index, count - 1))[name])
        first = index * length
        end = first + length
        after_last = min(count, -(-end // size))  # rounded up

        # Copy the overlap with each of these shards.
        for i in range(first // size, after_last):
            begin = i * size - first  # where that shard would start in this rank's part
            piece = shards(i)[name][max(0, -begin) : length - begin]
            average[max(0, begin) :][: len(piece)].copy_(piece)
    engine.averages.write()
