"""Compare the planner's predictions with measurements: memory, FLOPs and communication of a step.

    python run/bench_plan.py
        one rank
    deepspeed --num_accelerators 2 run/bench_plan.py --sizes nano/8 S/16
        two ranks

The cases are all combinations of sizes, ZeRO stages, data types, masks and checkpointing. Each case
trains three steps on random batches with a DeepSpeed engine, and measures the last one.

Memory is the number of bytes of live tensors on rank 0 (`LiveMemory` in
run/plan/activation_memory.py) that were allocated since before the engine was built: between steps,
the peak until the end of the backward pass, and the peak of the step. Memory inside kernels is not
counted. Communication is the size of the tensors of all collectives, counted as rings.

DeepSpeed's `destroy` does not free all memory of an engine. On a small machine measure B/16 one
stage at a time.
"""

import sys
from pathlib import Path

if __package__ is None:  # started as a file: import from the repository root, not from run/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gc
import itertools
import json
import tempfile

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from glimpse.run.lib import config, distributed
from glimpse.run.plan import activation_memory, flops, planner, synthetic_batch
from glimpse.run.plan.zero_memory import ADAM_TEMPORARIES
from glimpse.run.train import engine

# DeepSpeed settings that suit small models.
SMALL_BUCKETS = {
    "reduce_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
TOKENS = 12.0
VOCAB = 30523
MIB = 2**20
# Each predicted value is followed by its measurement and by the error of the prediction.
HEAD = (
    "size | ranks | ZeRO | type | mask | recompute | held, MiB | measured | off | passes, MiB |"
    " measured | off | step, MiB | measured | off | GFLOP per sample | measured | off | sent, MB |"
    " measured | off"
).split(" | ")


class SentBytes(TorchDispatchMode):
    """Count the bytes that this rank sends in collectives, as `bytes`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            sizes = [leaf.nbytes for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)]
            if "allreduce" in name:
                size = 2 * sum(sizes)
            else:  # the full tensor: the output of a gather, the input of a scatter
                size = max(sizes, default=0)
            self.bytes += size * (distributed.world_size() - 1) / distributed.world_size()
        return func(*args, **(kwargs or {}))


def measure_case(
    folder: Path, size: str, stage: int, dtype: str, mask: float, recompute: bool, samples: int
) -> list:
    """Return a row of the table; samples: size of the micro-batch on one rank."""
    world = distributed.world_size()
    cfg = load_config(folder, size, stage, dtype, mask, recompute, samples * world)
    cluster = planner.Cluster.from_device("A100-40", ranks=world)
    plan = planner.plan(cfg, cluster, TOKENS, adam=ADAM_TEMPORARIES["cpu"], vocab=VOCAB)
    persistent, passes_peak, step_peak, flop_count, sent = measure_step(cfg, samples)

    # Pairs of (predicted, measured).
    predicted_persistent = sum(plan.zero.persistent_bytes(plan.parameters, world).values())
    predicted_passes = max(
        sum(memory.values())
        for phase, memory in plan.memory_by_phase.items()
        if phase != "optimizer step"
    )
    predicted_sent = sum(plan.sent_bytes.values())
    pairs = [
        (predicted_persistent / MIB, persistent / MIB),
        (predicted_passes / MIB, passes_peak / MIB),
        (plan.peak[1] / MIB, step_peak / MIB),
        (plan.hardware_flops / 1e9, flop_count / 1e9),
        (predicted_sent / 1e6, sent / 1e6),
    ]
    row = [size, world, stage, dtype, f"{mask:.0%}", "yes" if recompute else "no"]
    for prediction, measurement in pairs:
        error = f"{prediction / measurement - 1:+.1%}" if measurement else ""
        row += [f"{prediction:.4g}", f"{measurement:.4g}", error]
    return row


def load_config(
    folder: Path, size: str, stage: int, dtype: str, mask: float, recompute: bool, batch: int
) -> config.RunConfig:
    """Return the config of a case; rank 0 writes its DeepSpeed JSON into the folder."""
    file = folder / f"{stage}-{dtype}.json"
    tree = {"zero_optimization": {"stage": stage, **SMALL_BUCKETS}}
    if dtype == "bf16":
        tree["bf16"] = {"enabled": True}

    def write_json() -> None:
        if distributed.rank() == 0:
            file.write_text(json.dumps(tree))

    distributed.rank0_first(write_json)
    spec = f"random({mask})" if mask else "none"
    return config.load(
        config.ROOT / "run/configs/flip_b16.yaml",
        [
            f"model.size={size}",
            f"batch={batch}",
            f"deepspeed={file}",
            f"views.image.mask={spec}",
            f"model.checkpoint_activations={str(recompute).lower()}",
        ],
    )


def measure_step(cfg: config.RunConfig, samples: int) -> tuple[int, int, int, float, float]:
    """Train three steps, and measure the last one.

    Return bytes between steps, peak bytes until the end of the backward pass, peak bytes of the
    step, FLOPs per sample, and bytes sent.
    """
    micro_batch = synthetic_batch.random_micro_batch(cfg, TOKENS, samples)
    linear = torch.nn.functional.linear
    gc.collect()
    with activation_memory.LiveMemory() as memory:
        trainer = engine.Engine(cfg, VOCAB)

        # The peak at the start of the optimizer step is that of the forward and backward passes.
        optimizer_step = trainer.ds.step
        passes_peaks = []

        def record_peak():
            passes_peaks.append(memory.peak)
            return optimizer_step()

        trainer.ds.step = record_peak

        # 1. Count FLOPs. This cannot be the step whose memory is measured: the counter keeps
        # tensors alive that checkpointing would free.
        with flops.create_counter() as counter:
            trainer.step([micro_batch], 1e-4)

        # 2. Let ZeRO-3 complete its record of the order of modules.
        trainer.step([micro_batch], 1e-4)

        # 3. Measure memory and communication.
        gc.collect()
        persistent = memory.current
        memory.peak = persistent
        with SentBytes() as sent:
            trainer.step([micro_batch], 1e-4)
        step_peak = memory.peak
    trainer.ds.destroy()
    # ZeRO-3 replaces this function and does not restore it.
    torch.nn.functional.linear = linear
    return persistent, passes_peaks[2], step_peak, counter.get_total_flops() / samples, sent.bytes


def main() -> None:
    parser = config.argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano/8", "S/16", "B/16"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument(
        "--types", nargs="+", default=["fp32", "bf16"], help="bf16 is skipped for stage 0"
    )
    parser.add_argument("--masks", nargs="+", type=float, default=[0.0, 0.5, 0.75])
    parser.add_argument("--micro", type=int, default=8, help="samples per rank")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    args = parser.parse_args()

    distributed.start()
    distributed.print_rank0("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    folder = Path(distributed.broadcast_from_rank0(lambda: tempfile.mkdtemp()))
    cases = itertools.product(args.sizes, args.stages, args.types, args.masks, (False, True))
    for size, stage, dtype, mask, recompute in cases:
        if stage == 0 and dtype != "fp32":
            continue
        row = measure_case(folder, size, stage, dtype, mask, recompute, args.micro)
        distributed.print_rank0("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    distributed.run_script(main)
