"""Recorded pieces, each recorded once: side by side where that is safe, for other batches by interpolation."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch

from lowvram.planner import compose
from lowvram.planner.allocator import Replay
from lowvram.planner.log import Requests
from lowvram.planner.record import LARGE
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Facts, Job, Recorded, Structure, Tracer, tracer

_MOST_PROCESSES = 4  # each builds the subject anew


class Pieces:
    """The pieces of one subject, recorded when first asked for. Close it, or use it in a `with`.

    Args:
        build: makes the subject on fake tensors; called in each process.
        processes: that record side by side; None: as many as there are processors, up to 4, where forking is safe.
        proportional: what a piece needs is a part that is always the same and one in proportion to its samples, and it
            bears any number of them; otherwise each size of micro-batch is recorded.
    """

    def __init__(
        self, build: Callable[[], Subject], *, processes: int | None = None, proportional: bool = True
    ) -> None:
        # Each recording begins with a collection of garbage, which need not look at all that was there before.
        self._froze = not gc.get_freeze_count()
        if self._froze:
            gc.freeze()
        self._bench = _Bench(build, freezes=self._froze)
        self._proportional = proportional
        self._recorded: dict[Job, Recorded] = {}
        self._facts: dict[Structure, Facts] = {}
        self.replays: dict[Hashable, tuple[Requests, Replay]] = {}  # of whole trainings: the same on every card
        self._build = build
        self._processes = _safe_processes() if processes is None else processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, and the fakes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._bench.close()
        if self._froze:
            gc.unfreeze()
            self._froze = False

    def facts(self, structure: Structure) -> Facts:
        """Of the subject when it is held so."""
        if structure not in self._facts:
            (self._facts[structure],) = self._run([Job(structure=structure, what="facts")])
        return self._facts[structure]

    def want(self, jobs: Iterable[Job]) -> None:
        """Record pieces that will be asked for, side by side."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self._recorded]
        for job, recorded in zip(missing, self._run(missing), strict=True):
            self._recorded[job] = recorded

    def get(self, job: Job) -> Recorded:
        """One piece, as recorded."""
        if job not in self._recorded:
            self.want([job])
        return self._recorded[job]

    def like(self, job: Job, unit: int) -> Recorded:
        """A piece worked out from that of a very large batch: one recording serves all numbers of samples.

        unit: samples that stay together.
        """
        wanted = self.base(job, unit)
        base = self.get(wanted)
        if wanted == job:
            return base
        return replace(base, piece=compose.scaled(base.piece, job.samples / (LARGE * unit)))

    def base(self, job: Job, unit: int) -> Job:
        """What has to be recorded for `like`."""
        return large(job, unit) if self._proportional else job

    def _run(self, jobs: list[Job]) -> list[Any]:
        if jobs and self._processes > 1:
            self._pool = self._pool or _pool(self._build, jobs[0].structure, self._processes)
            try:
                return list(self._pool.map(_do, jobs))
            except RuntimeError as error:
                # Where autograd has threads already, which nothing tells before, a fork can't run a backward.
                if not isinstance(error, BrokenExecutor) and "Autograd-and-Fork" not in str(error):
                    raise
                self._pool.shutdown(cancel_futures=True)
                self._pool, self._processes = None, 1
        return [self._bench.do(job) for job in jobs]


def large(job: Job, unit: int) -> Job:
    """The job of which others are worked out."""
    return replace(job, samples=LARGE * unit)


class _Bench:
    """A tracer for the structure that was last asked for. freezes: garbage is not looked for in what it builds."""

    def __init__(self, build: Callable[[], Subject], *, freezes: bool) -> None:
        self._build, self._freezes = build, freezes
        self._stack = ExitStack()
        self._structure: Structure | None = None
        self._tracer: Tracer | None = None

    def prepare(self, structure: Structure) -> Tracer:
        """The tracer for a structure."""
        if self._tracer is None or self._structure != structure:
            self.close()
            self._tracer = self._stack.enter_context(tracer(self._build, structure))
            self._structure = structure
            if self._freezes:
                gc.freeze()
        return self._tracer

    def do(self, job: Job) -> Any:
        made = self.prepare(job.structure)
        try:
            # The fakes' modes are entered for each job, so that nothing else is fake between two.
            with made.active():
                return made.facts() if job.what == "facts" else made.record(job)
        except BaseException:
            self.close()  # what was interrupted half-way is of no more use
            raise

    def close(self) -> None:
        if self._tracer is None:
            return
        self._structure, self._tracer = None, None
        self._stack.close()
        if self._freezes:
            gc.unfreeze()
            gc.collect()
            gc.freeze()


_bench: _Bench | None = None  # of a process that records for another


def _start(build: Callable[[], Subject], structure: Structure) -> None:
    global _bench
    torch.set_num_threads(1)
    _bench = _Bench(build, freezes=True)
    with suppress(Exception):  # which the first job meets again, and tells
        _bench.prepare(structure)  # all processes at once


def _do(job: Job) -> Any:
    assert _bench is not None
    return _bench.do(job)


def _pool(build: Callable[[], Subject], structure: Structure, processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork")  # `build` is a closure, which only a fork takes along
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(build, structure))


def _safe_processes() -> int:
    """Forking a process that uses CUDA breaks it there, and macOS's own libraries don't bear it either."""
    talks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not sys.platform.startswith("linux") or torch.cuda.is_initialized() or talks:
        return 1
    return min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
