"""One training of benchmarks.time_to_quality, in a process of its own that waits between its turns.

    python -m benchmarks.quality_worker

It reads requests as lines of JSON, and answers each with one; what else is printed goes to the standard error. The
first is {"recipe": NAME, "overrides": [...]}, answered by the environment; then `train`, `sample` and `finish` by
{"do": NAME, ...} with their arguments. A process of its own has a peak of resident memory, a cap of the card's and a
random state of its own, and while it waits for its next line it takes no processor time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.device import order_by_bus
from lowvram import Trainer, load_recipe
from lowvram.errors import LowVRAMError
from lowvram.launch import prefer_huge_pages
from lowvram.memory.guard import resident_peak_bytes
from lowvram.metrics.evaluation import batch_size
from lowvram.metrics.real import real_indices
from lowvram.settings import Settings

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class TimedTrainer(Trainer):
    """A trainer with a clock that counts training: neither saving nor sample grids, pages or a first look at the data.

    trained_seconds: up to the last slice's end. allocated_bytes, reserved_bytes: the most up to now while the clock
    ran; peak_is: of what. On a card it is the most in any phase, after the cache of what was sampled and saved was
    emptied. On a CPU both are of the process' resident set, libraries and what the heap keeps of earlier work included;
    where the system can't begin a peak anew (it can on Linux), also of making the trainer, sampling and saving.
    """

    def __init__(self, recipe: Settings) -> None:
        self.trained_seconds = 0.0
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_is = "reserved by torch on the card"  # on a CPU see `_go`
        self._since: float | None = None  # when the clock was last started
        self._waiting = ExitStack()  # holds the account still between slices
        super().__init__(recipe, quiet=True)
        self._before_joules = self.account.meter.read()  # of making all this
        self._steps = (result for result in self)

    def train(self, seconds: float | None, images: int | None) -> dict[str, Any]:
        """Go on up to so many seconds or images since the start; what it took until now, and whether it is done."""
        done = False
        self._waiting.close()
        self._go()
        while not done and not self._reached(seconds, images):
            result = next(self._steps, None)
            if result is None:
                done = True
            elif self.device.type == "cuda":
                for cost in result.costs.values():
                    self._note_peak(cost.allocated_bytes, cost.reserved_bytes)
        self._stop()
        if not done:
            self._waiting.enter_context(self.account.paused())
        return {
            "seconds": self.trained_seconds,
            "images": self.images_seen,
            "joules": self.account.meter.read() - self._before_joules,
            "energy_by": self.account.meter.by,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "peak_is": self.peak_is,
            "done": done or self.images_seen >= round(self.recipe.kimg * 1000),
        }

    def write_samples(self, n: int, path: str) -> dict[str, Any]:
        """Images 0 ... n - 1 of the averaged network to a file, uint8 [n, C, R, R], a few at a time."""
        # As training draws it, and as lowvram.evaluate measures.
        options: dict[str, Any] = {"noise_mode": "random"} if "noise_mode" in self.task.sample_options else {}
        real = self.task.dataset()
        if real.labels is not None and "classes" in self.task.sample_options:  # as often as the data has them
            options["classes"] = [int(real.labels[i]) for i in real_indices(len(real), len(real))]
        resolution, batch = self.recipe.resolution, batch_size(self.recipe.resolution)
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, 3, resolution, resolution)}
        with Path(path).open("wb") as out:  # what is mapped into memory would be resident
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, n, batch):
                images = self.sample(min(batch, n - start), seed=0, start=start, **options)
                out.write(images.contiguous().numpy().tobytes())
        return {}

    def finish(self) -> dict[str, Any]:
        """Save what was trained."""
        if self.images_seen < round(self.recipe.kimg * 1000):  # otherwise it has been
            self.save(final=True)
        self._waiting.close()
        self._steps.close()  # which writes the receipt and the page
        return {}

    def _reached(self, seconds: float | None, images: int | None) -> bool:
        if images is not None:
            return self.images_seen >= images
        assert seconds is not None and self._since is not None
        return self.trained_seconds + time.perf_counter() - self._since >= seconds

    def _go(self) -> None:
        """Start the clock, and memory's peak anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _reset_resident_peak():
            self.peak_is = "resident in the process while it trained"
        else:
            self.peak_is = "resident in the process, also while it was measured"
        self._since = time.perf_counter()

    def _stop(self) -> None:
        """Stop the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._since is not None:
            self.trained_seconds += time.perf_counter() - self._since
            if self.device.type != "cuda":
                resident = _resident_peak_bytes()
                self._note_peak(resident, resident)
        self._since = None

    def _note_peak(self, allocated_bytes: int, reserved_bytes: int) -> None:
        self.allocated_bytes = max(self.allocated_bytes, allocated_bytes)
        self.reserved_bytes = max(self.reserved_bytes, reserved_bytes)

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Stop the clock and the account of energy within, where they run."""
        if self._since is None:
            yield
            return
        self._stop()
        try:
            with self.account.paused():
                yield
        finally:
            self._go()

    def save(self, *, final: bool = False) -> Path | None:
        with self._uncounted():
            return super().save(final=final)

    def _greet(self) -> None:
        with self._uncounted():
            super()._greet()

    def _write_page(self, *, running: bool) -> None:
        with self._uncounted():
            super()._write_page(running=running)


def _reset_resident_peak() -> bool:
    """Begin the peak of this process' resident set anew, where the system can (Linux), and whether it did."""
    if _high_water_bytes() is None:
        return False
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): the peak becomes what is resident now
    except OSError:
        return False
    return True


def _resident_peak_bytes() -> int:
    """The peak since it was last begun anew; since the process' start where that can't be had."""
    peak = _high_water_bytes()
    return resident_peak_bytes() if peak is None else peak


def _high_water_bytes() -> int | None:
    """VmHWM; None where the system does not tell. That of getrusage never falls below a parent's."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]  # in kB of 1024 bytes
    return int(found[0]) * 1024 if found else None


def answer(lines: Iterator[str], out: IO[str]) -> None:
    """Do what the lines ask for, up to `finish` or their end; an error is an answer too, and the last."""

    def say(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=out, flush=True)

    try:
        asked = json.loads(next(lines))
        trainer = TimedTrainer(load_recipe(asked["recipe"], asked["overrides"]))
        say({"environment": record.environment(trainer.device), "device": trainer.device.type})
        work: dict[str, Callable[..., dict[str, Any]]]
        work = {"train": trainer.train, "sample": trainer.write_samples, "finish": trainer.finish}
        for line in lines:
            words = json.loads(line)
            name = words.pop("do")
            say(work[name](**words))
            if name == "finish":
                return
    except StopIteration:  # nobody asks any more
        return
    except (LowVRAMError, torch.OutOfMemoryError, OSError) as error:
        say({"error": (str(error) or repr(error)).splitlines()[0][:300]})


class Worker:
    """A training in a process of its own, which works while it is asked to.

    Raises (here and in `ask`):
        LowVRAMError: what it failed with.
    """

    def __init__(self, recipe: str, overrides: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.quality_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who asks
        )
        try:
            self.environment = self._ask({"recipe": recipe, "overrides": list(overrides)})
        except BaseException:
            self.close()
            raise

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request."""
        return self._ask({"do": name, **arguments})

    def _ask(self, content: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # then the answer is missing too, and says why
            print(json.dumps(content), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with status {self.process.wait()}"}
        if "error" in found:
            raise LowVRAMError(found["error"], "What it printed may say more.")
        return found

    def close(self) -> None:
        """End it and what it has started, now."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def main() -> None:
    """Entry of the command."""
    prefer_huge_pages()
    order_by_bus()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed by others must not be taken for an answer
    answer(iter(sys.stdin), out)


if __name__ == "__main__":
    main()
