"""Resume training from a checkpoint, on any number of ranks.

    universal = prepare_elastic(path, world_size())
        converts the checkpoint if the number of ranks has changed; else None
    engine = Engine(cfg, vocab_size, universal=universal is not None)
    manifest = resume(engine, path, universal)
        loads weights, optimizer and averages, and deletes the converted copy

On the same number of ranks DeepSpeed reads its own files; on another, a copy that is converted to
its universal format. That format drops frozen parameters and the teacher's fp32 averages, so they
are read from the original checkpoint.

DeepSpeed opens complete files of which it uses a part. memory_map_files() makes torch.load map them
into memory, so a process needs memory for its own state and one or two tensors.
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
    """Convert a checkpoint to DeepSpeed's universal format if the number of ranks has changed.

    Returns the path of the converted copy, or None if it is not needed. Rank 0 converts, after
    deleting the copies that an interrupted job left; the other ranks wait without a time limit.
    """
    manifest = read_manifest(path)
    target = path.with_name(f"universal-{path.name}")
    changed = manifest["ranks"] != ranks and manifest["stage"] > 0

    def prepare() -> None:
        if rank() != 0:
            return
        remove_universal(path.parent)
        if changed:
            print_rank0(f"{path}: converting from {manifest['ranks']} to {ranks} ranks")
            convert_to_universal(path, target)

    rank0_first(prepare)
    return target if changed else None


def remove_universal(folder: Path) -> None:
    """Delete all converted copies under RUN/checkpoints."""
    for copy in folder.glob("universal-*"):
        shutil.rmtree(copy)
    (folder / "latest_universal").unlink(missing_ok=True)


def conversion_bytes(path: Path) -> int:
    """Return the maximum disk space of a conversion, in bytes.

    Upper bound: the optimizer state as fragments and as full tensors, one rank's optimizer state
    once more, and the model states.
    """
    sizes = {file.name: file.stat().st_size for file in path.glob("*_states.pt")}
    optimizer = [size for name, size in sizes.items() if name.endswith("_optim_states.pt")]
    return sum(sizes.values()) + sum(optimizer) + max(optimizer)


def convert_to_universal(path: Path, target: Path) -> None:
    """Write a copy of a checkpoint in DeepSpeed's universal format.

    Raises OSError if there is not enough disk space or the conversion fails. It runs in this
    process rather than in a subprocess, which would continue to write after the job is killed.
    """
    # 1. Check that the copy will fit on the disk.
    needed = conversion_bytes(path)
    free = shutil.disk_usage(path).free
    if free < needed:
        ranks = read_manifest(path)["ranks"]
        raise OSError(
            f"{path}: resuming on a different number of ranks needs {needed / GB:.1f} GB of"
            f" temporary disk space, {free / GB:.1f} GB are free; free some, or resume on"
            f" {ranks} ranks"
        )

    # 2. Convert, with the arguments of DeepSpeed's script and its defaults.
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
        # DeepSpeed prints many lines, including progress bars.
        with (
            memory_map_files(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            ds_to_universal.main(arguments)
    except Exception as error:
        remove_universal(path.parent)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path}: conversion to the universal format failed: {reason}") from error


def memory_map_files() -> contextlib.AbstractContextManager:
    """Let torch.load map files into memory, and torch.save write no checksums.

    torch.load then reads only the parts of a file that are used. Checksums would take half of the
    time of torch.save.
    """
    # torch adds `patch` to the module when it is imported, which its annotations do not show
    settings: Any = serialization
    return settings.patch({"load.mmap": True, "save.compute_crc32": False})


def resume(engine: Engine, path: Path, universal: Path | None) -> dict:
    """Load a checkpoint into the engine, and return its manifest.

    universal: the converted copy if the number of ranks has changed; it is deleted afterwards.
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
    """Load the frozen parameters except the teacher's, which load_averages() writes."""
    teacher_ids = {id(teacher) for teacher, _ in engine.averages.pairs.values()}
    names = {}
    for name, parameter in engine.method.named_parameters():
        if not parameter.requires_grad and id(parameter) not in teacher_ids:
            names[name] = name
    if names:
        load_weights(engine.method, path, names)


@contextlib.contextmanager
def skip_padding_only_groups(engine: Engine) -> Iterator[None]:
    """Let stages 1 and 2 load the universal format when this rank's part of a group is all padding.

    DeepSpeed reads the state's keys from the first parameter of a group that has elements on this
    rank, and fails if no parameter has. Meanwhile, the group's first parameter acts as one that has
    no state to load.
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
    """Load this rank's shard of the teacher's averages from the saved shards of all ranks.

    ZeRO-3 splits each flat parameter into shards of equal size, the last one padded. Only the files
    whose shards overlap this rank's are opened.
    """
    sharded = engine.stage == 3
    saved_count = manifest["ranks"] if sharded else 1
    index = rank() if sharded else 0

    @cache
    def saved_shards(i: int) -> dict[str, torch.Tensor]:
        file = path / AVERAGE_FILE.format(i)
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)

    for name, average in engine.averages.values.items():
        # This rank's elements of the flat parameter are [first, end). A saved shard has `size`.
        length = len(average)
        size = len(saved_shards(min(index, saved_count - 1))[name])
        first = index * length
        end = first + length
        last = min(saved_count, -(-end // size))  # rounded up; exclusive

        # Copy the overlap with each saved shard.
        for i in range(first // size, last):
            begin = i * size - first  # position of that shard in `average`; may be negative
            piece = saved_shards(i)[name][max(0, -begin) : length - begin]
            average[max(0, begin) :][: len(piece)].copy_(piece)
    engine.averages.write()
