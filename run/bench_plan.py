"""Measure what run/plan/planner.py predicts: bytes on a rank and FLOPs of a sample.

The cases are all combinations of sizes, ZeRO stages, masks and checkpointing.

    python run/bench_plan.py
        one rank
    deepspeed --num_accelerators 2 run/bench_plan.py --sizes nano/8 S/16
        two

Each case is a real engine that takes three steps on made-up batches; the last is measured. Bytes
are of rank 0's tensors that live (Alive in run/plan/activation_memory.py), from before the engine
is built: between steps, at most until the backward pass is over, and at most in a whole step. What
a kernel allocates inside itself is not seen. Bytes sent are those of each collective's tensors, as
a ring sends them.
DeepSpeed's `destroy` leaves much of an engine behind: on a small machine measure B/16 a stage at a
time.
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
from glimpse.run.train import engine

SMALL_BUCKETS = {
    "reduce_bucket_size": 5_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
TOKENS, VOCAB = 12.0, 30523
HEAD = (
    "size | ranks | ZeRO | type | mask | recompute | held, MiB | measured | off | passes, MiB |"
    " measured | off | step, MiB | measured | off | GFLOP a sample | measured | off | sent, MB |"
    " measured | off"
).split(" | ")


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends in collectives: `bytes`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            sizes = [leaf.nbytes for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)]
            if "allreduce" in name:
                size = 2 * sum(sizes)
            else:  # what a gather makes, what a scatter is given
                size = max(sizes, default=0)
            self.bytes += size * (distributed.world() - 1) / distributed.world()
        return func(*args, **(kwargs or {}))


def measure_case(
    folder: Path, size: str, stage: int, kind: str, mask: float, recompute: bool, micro: int
) -> list:
    """Return a row of the table: what is predicted and what is measured."""
    world = distributed.world()
    cfg = load_config(folder, size, stage, kind, mask, recompute, micro * world)
    cluster = planner.Cluster.from_device("A100-40", ranks=world)
    plan = planner.plan(cfg, cluster, TOKENS, adam=planner.ADAM["cpu"], vocab=VOCAB)
    held, passes, peak, flop_count, sent = measure_step(cfg, micro)

    # Pairs of (predicted, measured).
    predicted_held = sum(plan.zero.persistent_bytes(plan.parameters, world).values())
    predicted_passes = max(
        sum(parts.values())
        for moment, parts in plan.memory_by_phase.items()
        if moment != "optimizer step"
    )
    predicted_sent = sum(plan.sent_bytes.values())
    pairs = [
        (predicted_held / 2**20, held / 2**20),
        (predicted_passes / 2**20, passes / 2**20),
        (plan.peak[1] / 2**20, peak / 2**20),
        (plan.hardware_flops / 1e9, flop_count / 1e9),
        (predicted_sent / 1e6, sent / 1e6),
    ]
    row = [size, world, stage, kind, f"{mask:.0%}", "yes" if recompute else "no"]
    for predicted, real in pairs:
        off = f"{predicted / real - 1:+.1%}" if real else ""
        row += [f"{predicted:.4g}", f"{real:.4g}", off]
    return row


def load_config(
    folder: Path, size: str, stage: int, kind: str, mask: float, recompute: bool, batch: int
) -> config.RunConfig:
    """Return the config of a case, whose DeepSpeed JSON rank 0 writes into the folder."""
    file = folder / f"{stage}-{kind}.json"
    tree = {"zero_optimization": {"stage": stage, **SMALL_BUCKETS}}
    if kind == "bf16":
        tree["bf16"] = {"enabled": True}

    def write() -> None:
        if distributed.rank() == 0:
            file.write_text(json.dumps(tree))

    distributed.rank0_first(write)
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


def measure_step(cfg: config.RunConfig, micro: int) -> tuple[int, int, int, float, float]:
    """Train three steps, and return what the last takes.

    (bytes between steps, at most until the backward pass is over, at most in a step, FLOPs of a
    sample, bytes sent)
    """
    part = synthetic_batch.random_micro_batch(cfg, TOKENS, micro)
    linear = torch.nn.functional.linear
    gc.collect()
    with activation_memory.LiveMemory() as alive:
        trainer = engine.Engine(cfg, VOCAB)

        # The peak when the optimizer's step begins is that of the forward and backward passes.
        update = trainer.ds.step
        passes = []

        def step():
            passes.append(alive.peak)
            return update()

        trainer.ds.step = step
        # not in the step whose memory is measured: it holds on to what checkpointing would free
        with flops.create_counter() as counter:
            trainer.step([part], 1e-4)
        trainer.step([part], 1e-4)  # ZeRO-3 watches which module follows which
        gc.collect()
        alive.peak = held = alive.current
        with SentBytes() as sent:
            trainer.step([part], 1e-4)
        peak = alive.peak
    trainer.ds.destroy()
    torch.nn.functional.linear = linear  # ZeRO-3 leaves its own there, for the next case too
    return held, passes[2], peak, counter.get_total_flops() / micro, sent.bytes


def main() -> None:
    parser = config.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano/8", "S/16", "B/16"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument(
        "--types", nargs="+", default=["fp32", "bf16"], help="bf16 needs a stage above 0"
    )
    parser.add_argument("--masks", nargs="+", type=float, default=[0.0, 0.5, 0.75])
    parser.add_argument("--micro", type=int, default=8, help="samples on a rank")
    parser.add_argument("--local_rank", type=int, help="from the launcher")
    args = parser.parse_args()

    distributed.start()
    distributed.print_rank0("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    folder = Path(distributed.broadcast_from_rank0(lambda: tempfile.mkdtemp()))
    cases = itertools.product(args.sizes, args.stages, args.types, args.masks, (False, True))
    for size, stage, kind, mask, recompute in cases:
        if stage == 0 and kind != "fp32":
            continue
        row = measure_case(folder, size, stage, kind, mask, recompute, args.micro)
        distributed.print_rank0("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    distributed.run_script(main)
