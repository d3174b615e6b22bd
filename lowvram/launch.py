"""The processes that `accelerate launch --num_processes N` means on a machine without GPUs.

There accelerate (1.10 to 1.15) sets the rendezvous address but starts a single process unless MPI is configured, so N
processes' worth of work would silently run as one. The train command notices this and starts them through torchrun.
"""

import os
import sys


def start_missing_processes() -> None:
    """Replace this process by torchrun with N processes, if accelerate was asked for N > 1 and started one."""
    wanted = _processes_asked_for()
    if wanted <= 1:
        return
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torchrun finds a free port itself
        environment.pop(name, None)
    environment.setdefault("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(wanted)]
    os.execvpe(sys.executable, [*torchrun, "-m", "lowvram.train", *sys.argv[1:]], environment)


def prefer_huge_pages() -> None:
    """Let torch's CPU allocator ask for huge pages, unless the user decided: a tenth less time on a CPU (see the log).

    To be called before torch allocates anything.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _processes_asked_for() -> int:
    """N of the `accelerate launch` above this process, where it started only this one; otherwise 1."""
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_PORT" in os.environ
    if not by_accelerate or "WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        return 1
    import psutil

    try:
        words = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return 1
    for index, word in enumerate(words):
        name, _, value = word.replace("_", "-").partition("=")
        if name == "--num-processes":
            value = value or (words[index + 1] if index + 1 < len(words) else "")
            return int(value) if value.isdigit() else 1
    return 1
