"""The ranks of a job: process group, collectives, signals and exit.

start()                      join the launcher's process group, or form one of one process
run_script(main)             run main on this rank; an error is printed once and ends all ranks
rank0_first(function)        call a function on rank 0, then on the others
StopSignal().is_requested()  True on all ranks after one of them received SIGTERM or SIGINT
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
from weakref import WeakKeyDictionary

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

# Of collectives: how long ranks wait for a rank that hangs. (If a rank dies, the launcher ends the
# job at once.)
TIMEOUT = datetime.timedelta(minutes=5)
# Values of a key in the store that rank0_first() waits for.
DONE = "1"
FAILED = "failed"
# The number of keys that unique_key() has returned for each process group's store.
_key_counts: WeakKeyDictionary[dist.Store, int] = WeakKeyDictionary()

T = TypeVar("T")


def start() -> None:
    """Join the launcher's process group; without a launcher, form one of this process.

    Raises ValueError if this rank has no device.
    """
    # 1. Without a launcher, set the variables that it would have set.
    if "RANK" not in os.environ:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError(
                "RANK: not set, but Slurm started several tasks; set RANK, LOCAL_RANK and"
                " WORLD_SIZE from Slurm's variables (docs/launching.md)"
            )
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=os.environ.get("MASTER_PORT", "0"),
        )

    # 2. Configure DeepSpeed for this rank's device.
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    check_devices(local_rank)
    deepspeed.utils.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", 1))))
        # This op takes 38 s to compile, and only speeds up inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed uses names that torch 2.13 deprecated.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    get_accelerator().set_device(local_rank)

    # 3. Connect to the other ranks.
    deepspeed.init_distributed(timeout=TIMEOUT, verbose=False)


def check_devices(local_rank: int) -> None:
    """Raise ValueError if this rank has no GPU, or on a machine without GPUs no CPU core."""
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        kind = "GPUs"
        alternative = ""
    elif os.environ.get("OVERSUBSCRIBE") == "1":
        return
    else:
        devices = len(os.sched_getaffinity(0))
        kind = "CPU cores"
        alternative = ", or set OVERSUBSCRIBE=1 in the environment to let ranks share cores"
    if local_rank >= devices:
        raise ValueError(
            f"--num_accelerators: rank {os.environ['RANK']} would be process {local_rank + 1} on a"
            f" machine with {devices} {kind}; start at most {devices}{alternative}"
        )


def rank() -> int:
    """Return this process's rank in the process group; before start(), the launcher's RANK."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks; before start(), the launcher's WORLD_SIZE."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    dist.barrier()


def rank0_first(function: Callable[[], T]) -> T:
    """Return function(), called on rank 0 first and then on the other ranks. All ranks must call.

    Use it where the first call creates a file that the later ones read. If rank 0 raises, the other
    ranks exit. They wait for up to 12 hours, longer than a collective could.
    """
    key = unique_key("once")
    if rank() == 0:
        return call_on_rank0(function, key)
    wait_for_rank0(key)
    return function()


def call_on_rank0(function: Callable[[], T], key: str) -> T:
    """Return function() on rank 0, and set the key in the store that the other ranks wait for."""
    try:
        result = function()
    except BaseException:
        store().set(key, FAILED)
        if world_size() > 1:
            # The store ends with this process; give the other ranks time to read the key.
            time.sleep(0.5)
        raise
    store().set(key, DONE)
    return result


def wait_for_rank0(key: str) -> None:
    """Wait until rank 0 has set the key; exit with 1 if rank 0 failed or has ended."""
    try:
        store().wait([key], datetime.timedelta(hours=12))
        failed = store().get(key).decode() == FAILED
    except dist.DistError:  # rank 0, which hosts the store, has ended
        failed = True
    if failed:
        # Rank 0 prints its error, then the launcher ends this process.
        time.sleep(10)
        exit_process(1)


def broadcast_from_rank0(function: Callable[[], str]) -> str:
    """Call function() on rank 0 only, and return its result on all ranks. All ranks must call.

    Use it where ranks could see different files on a network file system.
    """
    key = unique_key("result")

    def publish() -> None:
        if rank() == 0:
            store().set(key, function())

    def receive() -> str:
        return store().get(key).decode()

    # The second rank0_first keeps rank 0, which hosts the store, from ending before all have read.
    rank0_first(publish)
    return rank0_first(receive)


def unique_key(purpose: str) -> str:
    """Return a new key of the store, the same on all ranks, which all must call.

    All ranks make the same calls in the same order, so the number of calls is known to all.
    """
    count = _key_counts.get(store(), 0) + 1
    _key_counts[store()] = count
    return f"{purpose} {count}"


def store() -> dist.Store:
    """Return the key-value store of the process group, whose waits have their own timeouts."""
    return dist.distributed_c10d._get_default_store()


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device(get_accelerator().current_device_name())


def to_device(value):
    """Move the tensors of a nested dict to this rank's device; other values stay as they are."""
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device(), non_blocking=True)
    return value


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over ranks. All ranks must call."""
    values = values.to(device())
    dist.all_reduce(values)
    return values


def all_gather_list(items: list) -> list:
    """Concatenate the lists of all ranks. Items are pickled, so they should be small."""
    lists: list[list] = [[]] * world_size()
    dist.all_gather_object(lists, items)
    return [item for rank_items in lists for item in rank_items]


def print_rank0(message: str) -> None:
    """Print a line on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def all_reduce_min(value: int) -> int:
    """Return the minimum over ranks. All ranks must call."""
    minimum = torch.tensor([value], device=device())
    dist.all_reduce(minimum, dist.ReduceOp.MIN)
    return int(minimum)


class StopSignal:
    """A stop request by SIGTERM or SIGINT to any rank, on which all ranks agree.

    is_requested() becomes True on all ranks after the same step. Each call starts an all-reduce of
    the ranks' flags and returns the result of the previous call's, so that no step waits for it.
    """

    def __init__(self) -> None:
        """Install the signal handlers."""
        self.flag = 0.0
        # Waits for the previous call's all-reduce, and returns its result.
        self.pending_reduction: Callable[[], torch.Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_signal)

    def handle_signal(self, *_) -> None:
        self.flag = 1.0

    def is_requested(self) -> bool:
        """Return True if a rank had received a signal by the previous call. All ranks must call."""
        requested = False
        if self.pending_reduction is not None:
            requested = bool(self.pending_reduction().item())
        self.pending_reduction = self.start_reduction()
        return requested

    def start_reduction(self) -> Callable[[], torch.Tensor]:
        """Start to sum the ranks' flags; return a function that waits for the sum."""
        flags = torch.full((1,), self.flag, device=device())
        work = dist.all_reduce(flags, async_op=True)
        if not flags.is_cuda:

            def wait_on_cpu() -> torch.Tensor:
                work.wait()
                return flags

            return wait_on_cpu

        # On a GPU, reading `flags` one step later would wait for all kernels queued since. So queue
        # a copy to the host now (work.wait() only orders the streams), and wait for that copy.
        work.wait()
        host = torch.empty(1, pin_memory=True)
        done = torch.cuda.Event()
        host.copy_(flags, non_blocking=True)
        done.record()

        def wait_on_gpu() -> torch.Tensor:
            done.synchronize()
            return host

        return wait_on_gpu


def exit_process(code: int = 0) -> NoReturn:
    """Exit immediately, without the interpreter's shutdown.

    gloo's threads abort 8-20 % of the processes during that shutdown (docs/log.md).
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on this rank, and exit.

    ValueError and OSError are errors that the user can fix: print one line and exit with 2.
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
        # If all ranks have the same error, rank 0 prints it, and the launcher ends the other ranks
        # before they do.
        time.sleep(3)
    message = str(error)
    if "Traceback" in message:  # a loader process sends its traceback; keep the last line
        message = message.strip().splitlines()[-1].partition(": ")[2]
    source = f" on rank {rank()}" if rank() else ""
    print(f"error{source}: {message}", file=sys.stderr)
