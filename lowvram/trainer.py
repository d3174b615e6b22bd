"""The one training loop, for every task: phases, micro-batches, accumulation, resume, signals, metrics, snapshots."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from lowvram import checkpoint as checkpoints
from lowvram import pages, rng
from lowvram.data import Batch, Loader
from lowvram.errors import LowVRAMError
from lowvram.marks.runs import check_grid, data_mark, run_mark
from lowvram.memory.guard import Meter, PhaseCost, cap, in_gb
from lowvram.memory.recovery import free_memory
from lowvram.memory.rescue import Rescue
from lowvram.memory.sampling import place_within
from lowvram.phase import Phase
from lowvram.planner import picture
from lowvram.planner.training import apply_to, choose
from lowvram.progress import Progress, Trackers, estimate_cpu_cost
from lowvram.receipt.machine import open_account
from lowvram.resume import Start, find_start
from lowvram.sampling.grids import save_grid
from lowvram.settings import Settings, parse_bytes
from lowvram.signals import StopRequest
from lowvram.tasks import build_task, load_network, pick_device, task_class

Result = TypeVar("Result")


class NonFiniteError(LowVRAMError):
    """A loss or gradient became NaN or infinite. Nothing of the step was saved, nor applied (unless update=fused)."""


@dataclass(kw_only=True)
class StepResult:
    """What one step did.

    losses: mean over the batch, by the names of the phases that ran. costs: time and memory of those phases.
    """

    step: int
    images_seen: int
    losses: dict[str, float]
    costs: dict[str, PhaseCost]


class Trainer:
    """Train a recipe.

        trainer = Trainer(load_recipe("faces64", ["batch=8"]))
        trainer.fit()                       # or: for step in trainer: ...
        images = trainer.sample(16, seed=0)

    Making one creates the run folder, or finds it when the recipe says `resume`.

    Args:
        recipe: settings from `load_recipe`.
        quiet: no progress bar and no messages.
        synchronize: wait for the device around each phase, so that its time is exact (benchmarks).
    """

    def __init__(self, recipe: Settings, *, quiet: bool = False, synchronize: bool = False) -> None:
        self.accelerator = Accelerator(cpu=recipe.device == "cpu" or not torch.cuda.is_available())
        self.device = self.accelerator.device if recipe.device == "auto" else pick_device(recipe.device)
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.quiet = quiet
        self.progress = Progress(quiet=quiet or self.rank != 0)
        start = self._on_main_process(lambda: find_start(recipe))
        self.run, self.recipe = start.run, start.run.settings
        self.step, self.images_seen = 0, 0
        self.seconds = 0.0  # of training, over all sessions of the run
        self._saved_receipt: Any = None
        self.interrupted = False
        self.meter = Meter(self.device, synchronize=synchronize)
        self.stop_request = StopRequest(self.progress.say)
        for message in start.messages:
            self.progress.say(message)
        self.account = open_account(
            self.recipe, self.device, self.accelerator, say=self.progress.say, total=self._sum_of_numbers
        )
        with self.account.measuring():
            self._build(start)

    def _build(self, start: Start) -> None:
        """Make all that training needs, and then the folder."""
        Trackers.check(self.recipe)
        check_grid(self.recipe)
        vram_bytes = None if self.recipe.vram is None else parse_bytes("vram", self.recipe.vram)
        self.cap = cap(vram_bytes, self.device)
        for message in self.cap.messages:
            self.progress.say(message)
        self._train_earlier()
        self._on_main_process(self._prepare_data)
        folder = self.run.folder
        self.chosen = choose(self.recipe, self.device, self.cap, self.world_size, folder, self.progress.say)
        torch.manual_seed(self.recipe.seed)
        self.task = build_task(self.chosen.settings, self.device, folder)
        self.task.say = self.progress.say
        self.task.prepare_training()
        if self.recipe.weights is not None and start.checkpoint is None:
            self.task.load_weights(Path(self.recipe.weights).expanduser())
        self._check_processes()
        self.loader = self._make_loader()
        self._skipped: set[str] = set()
        processes = {"world_size": self.world_size, "sum_over_processes": self._sum_over_processes}
        self.applied = apply_to(self.task, self.chosen, self.device, **processes)
        networks = dict.fromkeys((*self.task.networks.values(), *self.applied.networks))
        self.rescue = Rescue(self.applied, networks, self.progress.say)
        if start.checkpoint is not None:
            self._restore(start)
        if self.rank == 0:  # only now: a mistake found on the way here leaves no folder and changes no saved recipe
            self.run.prepare()
            self.task.write_beside(self.run.folder)
            self.run.drop_metrics_after(self.step)
            self._save_plan()
            self.account.open(self.run.folder, self._saved_receipt, self.images_seen)
        self.trackers = Trackers(self.recipe, self.run) if self.rank == 0 else None

    def _train_earlier(self) -> None:
        """Train what this recipe stands on, such as an autoencoder, where no run of it is done."""
        kind, folder = task_class(self.recipe), self.run.folder
        earlier = self._on_main_process(lambda: kind.earlier(self.recipe, folder))
        if earlier is None:
            return
        self.progress.say(f"{self.recipe.recipe} stands on {earlier.recipe}, of which no run is done: that one first")
        with self.account.paused():
            first = Trainer(earlier, quiet=self.quiet)
            first.fit()
        if first.interrupted:
            raise KeyboardInterrupt(f"the same command goes on with {first.run.folder}")
        del first
        free_memory(self.device)

    def _prepare_data(self) -> None:
        with ExitStack() as stack:
            place = partial(place_within, self.cap, stack)
            task_class(self.recipe).prepare_data(self.recipe, self.device, self.run.folder, self.progress.say, place)

    # Training.

    def fit(self) -> None:
        """Train to the recipe's length, or until SIGINT or SIGTERM, which finish the step and save."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[StepResult]:
        """Train step by step. Metrics, grids and checkpoints are written as in `fit`."""
        total_images = round(self.recipe.kimg * 1000)
        if self.images_seen >= total_images:
            self.progress.say(f"{self.run.folder} has its {self.recipe.kimg:g} kimg already; kimg=... trains longer")
            return
        try:
            with self.account.training(lambda: self.images_seen):
                yield from self._train(total_images)
        finally:  # once the receipt is whole; also where a step failed
            self._write_page(running=False)
        if self.trackers is not None:
            self.trackers.finish()
        self.progress.say(f"{'stopped and saved' if self.interrupted else 'done'}: {self.run.folder}")
        self.account.say_all()

    def _train(self, total_images: int) -> Iterator[StepResult]:
        self._greet()
        self.account.begin(self.images_seen)
        self.interrupted = False
        batches = self.loader.iterate(self.images_seen)
        losses: dict[str, list[float]] = {}
        tick_seconds, tick_images = time.perf_counter(), self.images_seen
        with self.stop_request.listening(), self.progress.bar(self.images_seen, total_images), closing(batches):
            while self.images_seen < total_images and not self.interrupted:
                before = self.images_seen
                result = self.train_step(next(batches))
                for name, loss in result.losses.items():
                    losses.setdefault(name, []).append(loss)
                self.interrupted = self._agreed(self.stop_request.asked)
                last = self.images_seen >= total_images or self.interrupted
                if last or self._crossed(before, self.recipe.log_kimg):
                    seconds = time.perf_counter() - tick_seconds
                    self.seconds += seconds
                    self._log(losses, seconds, self.images_seen - tick_images)
                    losses, tick_seconds, tick_images = {}, time.perf_counter(), self.images_seen
                if last or self._crossed(before, self.recipe.snapshot_kimg):
                    with self.stop_request.saving():
                        self.save(final=last)
                    if not last:
                        self._write_page(running=True)
                yield result
            self.account.renew(self.images_seen)  # with the last save
            self.account.write()

    def train_step(self, batch: Batch) -> StepResult:
        """Run each phase that is due once, over the whole batch."""
        self._note_skipped(batch)
        costs_before = {name: (cost.seconds, cost.count) for name, cost in self.meter.costs.items()}
        start = self.images_seen
        images = self.rescue.again("a step", lambda: batch.images.to(self.device, non_blocking=True))
        losses = {}
        for phase in self.task.phases:
            if not phase.due(self.step):
                continue
            self.progress.phase(phase.name)
            with self.meter.phase(phase.name):
                losses[phase.name] = self.run_phase(phase, batch, images, start)
        self.step += 1
        self.images_seen += self.recipe.batch
        self.task.end_step(self.step)
        if self.task.averages:
            self.rescue.again("the average", self.applied.settle)
        for average in self.task.averages:
            self.rescue.again("the average", partial(average.update, self.images_seen, self.recipe.batch))
        self.progress.advance(self.images_seen)
        return StepResult(
            step=self.step, images_seen=self.images_seen, losses=losses, costs=self._costs_since(costs_before, losses)
        )

    def run_phase(self, phase: Phase, batch: Batch, images: Tensor, start: int) -> float:
        """Loss, gradients and update of one phase over the whole batch; returns the loss.

        images: of the batch, uint8 [n, C, H, W] or latents, on the device. start: place in the stream of its first one.
        Out of memory, the phase is begun again under a thriftier policy, with the same data and random numbers.
        """

        def gradients() -> tuple[Tensor, dict[str, Tensor]]:
            micro_batches = phase.micro_batches(images, batch.labels, batch.position, start, self.recipe.seed)
            with self.applied.running(phase):
                return self.applied.accumulate(phase, micro_batches)

        loss, means = self.rescue.redo(phase, gradients)
        outcome = self.rescue.resume(phase, lambda: self.applied.update(phase, loss))
        if not outcome.finite:
            raise self._non_finite(phase, outcome.loss, outcome.norm)
        if not outcome.applied:
            self.progress.say(f"phase {phase.name}: fp16 gradients overflowed; the step is skipped, the scale halved")
        elif phase.finish is not None:
            self.rescue.again(f"the end of phase {phase.name}", partial(phase.finish, means))
        return outcome.loss

    # Sampling and saving.

    def sample(self, n: int, seed: int = 0, **options: Any) -> Tensor:
        """n images of the averaged network, uint8 [n, C, H, W] on the CPU; image i depends on the seed and i alone."""
        asked = options.pop("micro_batch", None)

        def some(size: int | None) -> Tensor:
            with self.applied.sampling():  # which may be what runs out of memory
                return self.task.sample(n, seed, micro_batch=size or asked, **options)

        return self.rescue.in_slices(some, min(n, asked or self.recipe.batch))

    def save(self, *, final: bool = False) -> Path | None:
        """Write a checkpoint and a sample grid. A full disk loses neither the run nor older checkpoints.

        Raises:
            LowVRAMError: the disk is full and `final` leaves no later chance.
        """
        states = gather_object([rng.states(self.device)])
        self.account.renew(self.images_seen)
        content = self.rescue.again("saving", lambda: self._checkpoint(states))
        path, what = None, "checkpoint"
        if self.rank == 0:
            try:
                write = partial(checkpoints.write, self.run.checkpoints, self.step, content, keep=self.recipe.keep)
                path = self.rescue.again("saving", write)
                what = "sample grid"
                self.save_samples(path)  # after it, for the grid names what it was made by
            except OSError as error:
                problem = f"the {what} of step {self.step} could not be written to {self.run.folder}: {error}"
                if final:
                    raise LowVRAMError(
                        problem, "Older checkpoints are whole. Free some space, then resume=auto."
                    ) from error
                self.progress.say(f"{problem}. Training goes on; older checkpoints are whole. Free some space.")
        self.accelerator.wait_for_everyone()
        return path

    def _write_page(self, *, running: bool) -> None:
        if self.rank == 0:
            dataset, begun, say = self.task.dataset(), self.account.session.begun, self.progress.say
            pages.while_training(self.run.folder, dataset, begun=begun, running=running, say=say, device=self.device)

    def save_samples(self, checkpoint: Path | None = None) -> None:
        """Write fakes_KIMG.png, the same latents each time. checkpoint: the one that was written of these weights."""
        images = self.sample(self.recipe.grid, seed=self.recipe.seed)
        path, networks = self.run.grid_path(self.images_seen), self.task.sampling_networks
        try:
            mark = run_mark(self.recipe, networks, checkpoint, len(images), (self.step, self.images_seen))
            save_grid(images, path, mark=mark)
        except LowVRAMError as error:  # of what marks it, such as a key that was moved: no reason to stop
            self.progress.say(f"{path.name} is not written: {error.problem} {error.remedy}")

    def _checkpoint(self, rng_states: list[dict[str, Any]]) -> checkpoints.Checkpoint:
        self.applied.settle()
        tensors = {name: self.applied.full_state(network) for name, network in self.task.networks.items()}
        tensors["task"] = self.task.tensors()
        numbers: dict[str, Any] = {
            "step": self.step,
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "dataset": {"name": self.task.dataset().name, "contents": self.task.dataset().contents},
            "receipt": self.account.receipt().plain(),
            "optimizers": {},
            "rng": [],
        }
        for name, updater in self.applied.updaters.items():
            tensors[f"optimizer_{name}"], numbers["optimizers"][name] = updater.state()
        for index, state in enumerate(rng_states):
            tensors[f"rng_{index}"] = state["tensors"]
            numbers["rng"].append(state["numbers"])
        return checkpoints.Checkpoint(tensors=tensors, numbers=numbers)

    def _restore(self, start: Start) -> None:
        assert start.checkpoint is not None
        saved = checkpoints.read(start.checkpoint)
        for name, network in self.task.networks.items():
            if name not in saved.tensors and name in self.task.optional_networks:  # switched on by name since then
                continue
            load_network(network, saved.tensors.get(name, {}), name, start.checkpoint, self.applied.load_state)
        for name, updater in self.applied.updaters.items():
            packed = saved.tensors[f"optimizer_{name}"]
            for message in updater.load_state(packed, saved.numbers["optimizers"][name]):
                self.progress.say(f"optimizer of {name}: {message}")
        self.task.load_tensors(saved.tensors["task"])
        self.step, self.images_seen = saved.numbers["step"], saved.numbers["images_seen"]
        self.seconds = saved.numbers["seconds"]
        self._saved_receipt = saved.numbers.get("receipt")
        if len(saved.numbers["rng"]) > self.rank:
            rng.restore(
                {"tensors": saved.tensors[f"rng_{self.rank}"], "numbers": saved.numbers["rng"][self.rank]}, self.device
            )
        was = saved.numbers["dataset"]
        images = self.task.dataset()
        same = was["contents"] == images.contents if "contents" in was else was["fingerprint"] == images.fingerprint
        if not same:
            self.progress.say(
                f"the data set is not the one the run was begun with ({was['name']}); its order starts anew from here"
            )

    # Around a step.

    def _greet(self) -> None:
        dataset = self.task.dataset()
        source = (
            "No data.path given: training on the built-in drawn faces"
            if self.recipe.data.path is None
            else dataset.name
        )
        self.progress.say(f"{source}, {len(dataset)} images at {self.recipe.resolution}x{self.recipe.resolution}")
        if self.cap.allocator_bytes is not None:
            self.progress.say(f"capped to vram={self.recipe.vram}: {in_gb(self.cap.allocator_bytes)} for tensors")
        sizes = ", ".join(
            f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
            for name, network in self.task.networks.items()
            if any(network is trained for phase in self.task.phases for trained in phase.networks)
        )
        self.progress.say(f"{sizes} parameters on {self.device}; run folder {self.run.folder}")
        if self.images_seen == 0 and self.rank == 0:
            count = min(self.recipe.grid, len(dataset))
            reals = torch.stack([dataset[i] for i in range(count)])
            save_grid(reals, self.run.folder / "reals.png", mark=data_mark(self.recipe, count))
            self.save_samples()
        together = self.world_size > 1 and self.recipe.memory.fsdp != "none"  # one process alone would wait for ever
        if self.device.type == "cpu" and self.rank == 0 and not together:
            self.progress.say(estimate_cpu_cost(self.task, self.recipe, self.applied, self.images_seen))

    def _log(self, losses: dict[str, list[float]], seconds: float, images: int) -> None:
        costs = self.meter.take()
        self.account.renew(self.images_seen)
        values: dict[str, Any] = {
            "step": self.step,
            "kimg": self.images_seen / 1000,
            "s_per_kimg": seconds / images * 1000,
            "seconds": round(self.seconds, 3),
            **{f"loss/{name}": sum(all_) / len(all_) for name, all_ in losses.items()},
            **self.task.status(),
            "peak_allocated_bytes": max((c.allocated_bytes for c in costs.values()), default=0),
            "peak_reserved_bytes": max((c.reserved_bytes for c in costs.values()), default=0),
            "device_bytes": max((c.device_bytes for c in costs.values()), default=0),
        }
        for message in self.meter.take_messages():
            self.progress.say(message)
        for name, cost in costs.items():
            values[f"seconds/{name}"] = cost.seconds / cost.count
            values[f"peak_allocated_bytes/{name}"] = cost.allocated_bytes
            values[f"peak_reserved_bytes/{name}"] = cost.reserved_bytes
            values[f"device_bytes/{name}"] = cost.device_bytes
        if self._skipped:
            values["skipped_files"] = len(self._skipped)
        if self.rank == 0:
            values |= self.account.values()
            self.run.log(values)
            self.account.write()
            self.progress.show(values, self.account.short(), on_gpu=self.device.type == "cuda")
            if self.trackers is not None:
                self.trackers.log(values)

    def _crossed(self, before: int, every_kimg: float) -> bool:
        """Whether a multiple of so many kimg lies between the image counts before and now."""
        every_images = every_kimg * 1000
        return int(before // every_images) < int(self.images_seen // every_images)

    def _costs_since(self, before: dict[str, tuple[float, int]], ran: dict[str, float]) -> dict[str, PhaseCost]:
        out = {}
        for name in ran:
            cost, (seconds, count) = self.meter.costs[name], before.get(name, (0.0, 0))
            out[name] = PhaseCost(
                seconds=cost.seconds - seconds,
                count=cost.count - count,
                allocated_bytes=cost.allocated_bytes,
                reserved_bytes=cost.reserved_bytes,
                device_bytes=cost.device_bytes,
            )
        return out

    def _note_skipped(self, batch: Batch) -> None:
        for reason in batch.skipped:
            if reason not in self._skipped:
                self._skipped.add(reason)
                self.progress.say(f"skipped {reason}")

    def _non_finite(self, phase: Phase, loss: float, norm: float) -> NonFiniteError:
        what = f"loss is {loss}" if not _finite(loss) else f"gradient norm is {norm}"
        last = checkpoints.candidates(self.run.checkpoints)
        remedy = (
            f"{last[0]} is untouched: go on from it with resume=auto" if last else "Nothing was saved yet: start again"
        )
        return NonFiniteError(
            f"phase {phase.name}: the {what} at step {self.step} ({self.images_seen / 1000:g} kimg).",
            f"{remedy} and a lower optimizer.lr, or precision=fp32.",
        )

    def _save_plan(self) -> None:
        if self.chosen.plan is None:
            return
        try:
            self.chosen.plan.save(self.run.folder / "plan.json")
            picture.draw(self.chosen.plan, self.run.folder / "plan.png")
        except OSError as error:
            self.progress.say(f"the plan could not be written to {self.run.folder}: {error}")

    # Processes.

    def _make_loader(self) -> Loader:
        data = self.recipe.data
        return Loader(
            self.task.items(),
            batch=self.recipe.batch,
            seed=self.recipe.seed,
            mirror=data.mirror,
            workers=data.workers,
            group=self.task.group,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _check_processes(self) -> None:
        parts = self.world_size * self.task.group
        if self.recipe.batch % parts:
            raise LowVRAMError(
                f"batch={self.recipe.batch} does not divide among {self.world_size} processes "
                f"in groups of {self.task.group}.",
                f"Use a multiple of {parts}.",
            )
        first_of_last_process = self.recipe.batch // parts * (self.world_size - 1)  # see Loader for who holds what
        for phase in self.task.phases:
            if phase.samples <= first_of_last_process:
                raise LowVRAMError(
                    f"the {phase.samples} images of phase {phase.name} leave some of {self.world_size} processes "
                    "without one.",
                    "Use loss.path_length_batch_shrink=1, or fewer processes.",
                )

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, reduction="sum")
        return summed

    def _sum_of_numbers(self, numbers: Sequence[float]) -> Sequence[float]:
        if self.world_size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        summed: list[float] = self._sum_over_processes(values).tolist()
        return summed

    def _agreed(self, flag: bool) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        return self._sum_of_numbers([flag])[0] > 0

    def _on_main_process(self, find: Callable[[], Result]) -> Result:
        """Choose, find or make something in one process, and tell the others what it is."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [find()]
            except LowVRAMError as error:
                outcome = [error]
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], LowVRAMError):
            raise outcome[0]
        result: Result = outcome[0]
        return result


def _finite(value: float) -> bool:
    return value - value == 0.0
