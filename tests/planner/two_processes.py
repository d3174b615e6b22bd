"""Two processes that train, and what the allocator of one of them really gave.

`python -m torch.distributed.run --nproc_per_node 2 tests/planner/two_processes.py FILE FSDP MICRO ACTIVATIONS ...`
measures one training after another.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from allocated import peaks_of
from planned import stylegan2
from torch import Tensor

from lowvram.memory.apply import Applied
from lowvram.memory.policy import MemoryPolicy, PhasePolicy
from lowvram.phase import Phase

WORLD = 2
BUILD = stylegan2("augment.mode=none", "batch=16", "resolution=16", "model.num_fp16_res=0")  # a CPU computes in fp32


def activations_of(second_order: bool, activations: str) -> str:
    """Of a phase: those of a second derivative are kept."""
    return "keep" if second_order else activations


def measured(fsdp: str, micro: int, activations: str) -> dict[str, list[int]]:
    """By phase, bytes: the peak of its gradients, what outlives its kernels of it, and the peak of its update."""
    made = BUILD()
    own = {
        p.name: PhasePolicy(activations=activations_of(p.second_order, activations), micro_batch=micro)
        for p in made.phases
    }
    applied = Applied(
        MemoryPolicy(phases=own, fsdp=fsdp),
        made.phases,
        device=torch.device("cpu"),
        averages=made.averages,
        own_precision=made.own_precision,
        world_size=WORLD,
        sum_over_processes=summed,
    )
    found: dict[str, list[int]] = {}
    for _ in range(2):  # the second time all is there
        for phase in made.phases:

            def gradients(phase: Phase = phase) -> Tensor:
                with applied.running(phase):
                    parts = phase.samples // WORLD // min(micro, phase.samples // WORLD)
                    size = phase.samples // WORLD // parts
                    return applied.accumulate(phase, (made.micro_batch(phase, size) for _ in range(parts)))[0]

            real = peaks_of(gradients)
            update = peaks_of(lambda phase=phase: applied.update(phase, torch.zeros([])))  # type: ignore[misc]
            found[phase.name] = [real.all_bytes, real.outliving_bytes, update.all_bytes]
    return found


def summed(value: Tensor) -> Tensor:
    """As accelerate does it."""
    copy = value.clone()
    dist.all_reduce(copy)
    return copy


def all_gather(output: Tensor, input_: Tensor | None = None, **options: Any) -> None:
    """gloo's own has a copy of the output in the allocator's memory, which NCCL's has not."""
    given = options.get("input_tensor", input_)
    mine, theirs = (output.view(WORLD, -1)[n] for n in (dist.get_rank(), 1 - dist.get_rank()))
    theirs.copy_(exchanged(given.flatten()))
    if mine.data_ptr() != given.data_ptr():
        mine.copy_(given.flatten())


def reduce_scatter(output: Tensor, input: Tensor, **_: Any) -> None:
    """gloo's own has a copy of the input."""
    mine, theirs = (input.view(WORLD, -1)[n] for n in (dist.get_rank(), 1 - dist.get_rank()))
    output.copy_(mine)
    output += exchanged(theirs)


def exchanged(tensor: Tensor) -> Tensor:
    """What the other process has here, in memory that is not the allocator's."""
    sent, got = (torch.from_numpy(np.empty(tensor.numel(), np.float32)) for _ in range(2))
    sent.copy_(tensor)
    other = 1 - dist.get_rank()
    for work in (dist.isend(sent, other), dist.irecv(got, other)):
        work.wait()
    return got


def main() -> None:
    """Measure, and have the first process write what it found."""
    file, *words = sys.argv[1:]
    dist.init_process_group("gloo")
    for name in ("all_gather_into_tensor", "all_gather_single"):  # by torch's version
        setattr(dist, name, all_gather)
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        setattr(dist, name, reduce_scatter)
    torch.set_num_threads(1)
    found = [measured(words[n], int(words[n + 1]), words[n + 2]) for n in range(0, len(words), 3)]
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
