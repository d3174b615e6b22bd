"""A recipe's task as a subject to plan for."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lowvram.phase import MicroBatch, Phase
from lowvram.planner.subject import Subject
from lowvram.settings import Settings
from lowvram.tasks import build_task


def subject_of(settings: Settings) -> Callable[[], Subject]:
    """What builds the task of a recipe, on fake tensors: to be called within `subject.fake_card`."""

    def build() -> Subject:
        device = torch.device("cpu")
        task = build_task(settings, device)
        task.prepare_training()
        shape = (3, settings.resolution, settings.resolution)

        def micro_batch(phase: Phase, n: int) -> MicroBatch:
            images = torch.empty(n, *shape, dtype=torch.uint8, device=device)
            labels = torch.zeros(n, dtype=torch.int64, device=device)
            return MicroBatch(images=images, labels=labels, seeds=seeds(n))

        def sample(n: int) -> Tensor:
            return task.sample(n, micro_batch=n)

        whole = settings.batch * shape[0] * shape[1] * shape[2]
        return Subject(
            phases=task.phases,
            networks=task.networks,
            micro_batch=micro_batch,
            averages=task.averages,
            resident=list(task.tensors().values()),
            batch_bytes=whole,
            sample=sample,
            sampling_slice=lambda micro: max(1, micro // 2),
            own_precision=task.own_precision,
            zero_nonfinite=task.own_precision and settings.precision in ("auto", "fp16"),
        )

    return build


def seeds(n: int) -> Tensor:
    """Seeds of n samples, real numbers even in a trace."""
    with unset_fake_temporarily():
        return torch.arange(1, n + 1)
