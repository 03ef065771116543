"""The processes of a job: joining them, what each is, what they decide together, and leaving
cleanly.

    start()                  the launcher's process group; one process if no launcher set one up
    run_script(main)         a script's main on this rank, errors told once, no collective torn
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

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

# for a rank that hangs; a rank that dies ends its launcher's job at once
TIMEOUT = datetime.timedelta(minutes=5)
FAILED = b"failed"
_once: list[str] = []  # the keys at the store that `once` has used


def start() -> None:
    """Join the launcher's process group, or be the only process where there is no launcher."""
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
        devices, kind, otherwise = torch.cuda.device_count(), "GPUs", ""
    elif os.environ.get("OVERSUBSCRIBE") == "1":
        return
    else:
        devices, kind = len(os.sched_getaffinity(0)), "CPU cores"
        otherwise = ", or let ranks share cores by OVERSUBSCRIBE=1 in the environment"
    if local >= devices:
        raise ValueError(
            f"--num_accelerators: rank {os.environ['RANK']} would be process {local + 1} on a"
            f" machine with {devices} {kind}; start at most {devices}{otherwise}"
        )


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    dist.barrier()


def once(make: Callable):
    """make(), by rank 0 first and then by the others: for files that the first call makes and the
    later ones find.
    """
    _once.append(f"once {len(_once)}")
    if rank():
        try:
            store().wait([_once[-1]], datetime.timedelta(hours=12))
            failed = store().get(_once[-1]) == FAILED
        except dist.DistError:  # rank 0, which keeps the store, is gone
            failed = True
        if failed:  # it says why, and the launcher ends this one meanwhile
            time.sleep(10)
            finish(1)
        return make()
    try:
        made = make()
    except BaseException:
        store().set(_once[-1], FAILED)
        time.sleep(0.5 * (world() > 1))  # to be heard: the store goes when this process does
        raise
    store().set(_once[-1], "1")
    return made


def told(make: Callable[[], str]) -> str:
    """make(), by rank 0 alone, told to all: what ranks might see differently on a network file
    system.
    """
    key = f"told {len(_once)}"
    once(lambda: rank() or store().set(key, make()))
    return once(lambda: store().get(key).decode())


def store() -> dist.Store:
    """The key-value store of the process group: for waits that are longer than a collective may
    take.
    """
    return dist.distributed_c10d._get_default_store()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def to_device(value):
    """A batch or part of it on this rank's device; what is no tensor stays."""
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    return value.to(device(), non_blocking=True) if isinstance(value, torch.Tensor) else value


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks; every rank must ask."""
    values = values.to(device())
    dist.all_reduce(values)
    return values


def gathered(items: list) -> list:
    """The ranks' lists as one, on every rank; for small things that can be pickled."""
    every: list = [[]] * world()
    dist.all_gather_object(every, items)
    return [item for items in every for item in items]


def say(message: str) -> None:
    """A line for people, once."""
    if not rank():
        print(message, flush=True)


def least(value: int) -> int:
    """The smallest of the ranks' values; every rank must ask."""
    found = torch.tensor([value], device=device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


class Stop:
    """SIGTERM or SIGINT, agreed on by all ranks: `asked()` becomes true on every rank after the
    same step.

    The flags are reduced behind the step's back and read one step later, so that no step waits for
    them.
    """

    def __init__(self):
        self.flag, self.pending = 0.0, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_) -> None:
        self.flag = 1.0

    def asked(self) -> bool:
        answer = False
        if self.pending is not None:
            answer = bool(self.pending().item())
        flags = torch.full((1,), self.flag, device=device())
        work = dist.all_reduce(flags, async_op=True)
        if flags.is_cuda:  # wait for this number alone, not for the kernels that were queued since
            work.wait()
            host, done = torch.empty(1, pin_memory=True), torch.cuda.Event()
            host.copy_(flags, non_blocking=True)
            done.record()
            self.pending = lambda: done.synchronize() or host
        else:
            self.pending = lambda: work.wait() and flags
        return answer


def finish(code: int = 0) -> None:
    """Leave at once: gloo's threads abort 8-20 % of the processes that end through the interpreter
    (docs/log.md).
    """
    if code == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main on this rank; what a user can mend is told in one line, by the first rank
    that meets it.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if rank():
            # where all ranks fail alike, rank 0 speaks and the launcher ends the others meanwhile
            time.sleep(3)
        said = str(error)
        if "Traceback" in said:  # from a loader process, which sends its whole trace
            said = said.strip().splitlines()[-1].partition(": ")[2]
        print(
            f"error: {said}" if not rank() else f"error on rank {rank()}: {said}", file=sys.stderr
        )
        finish(2)
    except BaseException as error:
        if isinstance(error, SystemExit):
            finish(error.code if isinstance(error.code, int) else 1)
        traceback.print_exc()
        finish(1)
    finish(0)
