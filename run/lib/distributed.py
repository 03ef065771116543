"""The processes of a job: their process group, their collectives, and a clean exit.

start()                  the launcher's process group; one process if no launcher set one up
run_script(main)         a script's main on this rank; prints an error once, ends all ranks
Stop().asked()           a signal to stop, agreed on by all ranks
"""

import datetime
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

# for a rank that hangs; a rank that dies ends its launcher's job at once
TIMEOUT = datetime.timedelta(minutes=5)
FAILED = "failed"
_store_keys: list[str] = []  # the keys at the store that `once` has used

T = TypeVar("T")


def start() -> None:
    """Join the launcher's process group, or be the only process where there is no launcher."""
    # A process without a launcher is a job of its own.
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError(
                "RANK: not set, though Slurm started several tasks; map SLURM_PROCID and its like"
                " first (docs/running.md)"
            )
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=os.environ.get("MASTER_PORT", "0"),
        )

    # The device of this rank, and DeepSpeed's settings for it.
    local = int(os.environ.get("LOCAL_RANK", 0))
    check_devices(local)
    deepspeed.utils.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", 1))))
        # compiles for 38 s, and only speeds inference up
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # from inside DeepSpeed: names that torch 2.13 renamed
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    get_accelerator().set_device(local)
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)


def check_devices(local: int) -> None:
    """Refuse a rank without a device of its own: a GPU or, where there is none, a core."""
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        kind = "GPUs"
        otherwise = ""
    elif os.environ.get("OVERSUBSCRIBE") == "1":
        return
    else:
        devices = len(os.sched_getaffinity(0))
        kind = "CPU cores"
        otherwise = ", or let ranks share cores by OVERSUBSCRIBE=1 in the environment"
    if local >= devices:
        raise ValueError(
            f"--num_accelerators: rank {os.environ['RANK']} would be process {local + 1} on a"
            f" machine with {devices} {kind}; start at most {devices}{otherwise}"
        )


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    dist.barrier()


def rank0_first(make: Callable[[], T]) -> T:
    """Return make(), called by rank 0 first and then by the others.

    For files that the first call makes and the later ones find.
    """
    key = f"once {len(_store_keys)}"
    _store_keys.append(key)
    if rank() == 0:
        return call_on_rank0(make, key)
    wait_for_rank0(key)
    return make()


def call_on_rank0(make: Callable[[], T], key: str) -> T:
    """Return make() on rank 0, and set the key at the store that the other ranks wait for."""
    try:
        result = make()
    except BaseException:
        store().set(key, FAILED)
        if world_size() > 1:
            # The store ends with this process; give the other ranks time to read it.
            time.sleep(0.5)
        raise
    store().set(key, "1")
    return result


def wait_for_rank0(key: str) -> None:
    """Wait until rank 0 has set the key; exit with 1 if it failed or is gone."""
    try:
        store().wait([key], datetime.timedelta(hours=12))
        failed = store().get(key).decode() == FAILED
    except dist.DistError:  # rank 0, which keeps the store, is gone
        failed = True
    if failed:
        # Rank 0 prints its error, and the launcher ends this process meanwhile.
        time.sleep(10)
        exit_process(1)


def broadcast_from_rank0(make: Callable[[], str]) -> str:
    """Return rank 0's make() on every rank; the others do not call it.

    For what ranks might see differently on a network file system.
    """
    key = f"told {len(_store_keys)}"

    def publish() -> None:
        if rank() == 0:
            store().set(key, make())

    def receive() -> str:
        return store().get(key).decode()

    rank0_first(publish)
    return rank0_first(receive)


def store() -> dist.Store:
    """Return the key-value store of the process group.

    For waits that are longer than a collective may take.
    """
    return dist.distributed_c10d._get_default_store()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def to_device(value):
    """Return a batch or a part of it on this rank's device; what is no tensor stays."""
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device(), non_blocking=True)
    return value


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks; every rank must call."""
    values = values.to(device())
    dist.all_reduce(values)
    return values


def all_gather_list(items: list) -> list:
    """Return the ranks' lists as one, on every rank; for small things that can be pickled."""
    lists: list[list] = [[]] * world_size()
    dist.all_gather_object(lists, items)
    return [item for rank_items in lists for item in rank_items]


def print_rank0(message: str) -> None:
    """Print a line on rank 0 alone."""
    if rank() == 0:
        print(message, flush=True)


def all_reduce_min(value: int) -> int:
    """Return the smallest of the ranks' values; every rank must call."""
    smallest = torch.tensor([value], device=device())
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


class StopSignal:
    """SIGTERM or SIGINT, agreed on by all ranks.

    `asked()` becomes true on every rank after the same step. The flags are reduced in the
    background and read one step later, so that no step waits for them.
    """

    def __init__(self) -> None:
        self.flag = 0.0
        # returns the reduced flags of the last call of `asked`
        self.pending_reduction: Callable[[], torch.Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_signal)

    def handle_signal(self, *_) -> None:
        self.flag = 1.0

    def is_requested(self) -> bool:
        """Return True if a rank had been asked to stop at the last call; every rank must call."""
        answer = False
        if self.pending_reduction is not None:
            answer = bool(self.pending_reduction().item())
        self.pending_reduction = self.start_reduction()
        return answer

    def start_reduction(self) -> Callable[[], torch.Tensor]:
        """Start the sum of the ranks' flags; return a function that waits for it."""
        flags = torch.full((1,), self.flag, device=device())
        work = dist.all_reduce(flags, async_op=True)
        if not flags.is_cuda:

            def reduced() -> torch.Tensor:
                work.wait()
                return flags

            return reduced

        # Wait for this number alone, not for the kernels that were queued since.
        work.wait()
        host = torch.empty(1, pin_memory=True)
        done = torch.cuda.Event()
        host.copy_(flags, non_blocking=True)
        done.record()

        def copied() -> torch.Tensor:
            done.synchronize()
            return host

        return copied


def exit_process(code: int = 0) -> NoReturn:
    """Exit at once, without the interpreter's shutdown.

    gloo's threads abort 8-20 % of the processes that end through it (docs/log.md).
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on this rank, and exit.

    An error that the user can fix prints one line, on the first rank that meets it.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        print_error(error)
        exit_process(2)
    except SystemExit as error:
        exit_process(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


def print_error(error: ValueError | OSError) -> None:
    """Print an error in one line, with the rank if it is not 0."""
    if rank():
        # Where all ranks fail alike, rank 0 prints, and the launcher ends the others meanwhile.
        time.sleep(3)
    message = str(error)
    if "Traceback" in message:  # from a loader process, which sends its whole trace
        message = message.strip().splitlines()[-1].partition(": ")[2]
    where = f" on rank {rank()}" if rank() else ""
    print(f"error{where}: {message}", file=sys.stderr)
