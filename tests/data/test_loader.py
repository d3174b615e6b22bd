"""The stream of batches: a pure function of (seed, position), however it is cut, spread or resumed."""

import itertools
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import number_of

from lowvram.data import Batch, Loader, loader, open_dataset
from lowvram.data.dataset import ImageSet, Picture
from lowvram.errors import LowVRAMError


class Painted(ImageSet):
    """Images painted from their number, with no file behind them: pixel value = index, left half marked in red."""

    def __init__(self, count: int) -> None:
        super().__init__(name="painted", resolution=4, labels=np.arange(count) % 3, class_names=["a", "b", "c"])
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Picture:
        pixels = np.full((4, 4, 3), index, np.uint8)
        pixels[:, :2, 0] = 255
        pixels[:, 2:, 0] = 0
        return Picture(pixels)

    def file_name(self, index: int) -> str:
        return str(index)

    def identity(self) -> list[str]:
        return []


def make(dataset: ImageSet | int, **settings) -> Loader:
    chosen = {"batch": 4, "seed": 0, "mirror": True, "workers": 0, **settings}
    return Loader(Painted(dataset) if isinstance(dataset, int) else dataset, **chosen)


def take(loader: Loader, count: int, images_seen: int = 0) -> list[Batch]:
    stream = loader.iterate(images_seen)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def rows(batches: list[Batch]) -> list[tuple[int, int, bytes]]:
    """(position, label, pixels) of each sample."""
    return [
        (int(k), int(label), image.numpy().tobytes())
        for batch in batches
        for k, label, image in zip(batch.position, batch.labels, batch.images, strict=True)
    ]


def workers_of_this_process() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


def test_batch_types():
    (batch,) = take(make(10), 1)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 4, 4)
    assert batch.labels.dtype == batch.position.dtype == torch.int64
    assert batch.position.tolist() == [0, 1, 2, 3] and batch.skipped == [] and len(batch) == 4


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own():
    seen = [int(b.images[i, 1, 0, 0]) for b in take(make(20, batch=5), 12) for i in range(5)]
    epochs = [seen[at : at + 20] for at in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(20))


def test_images_and_labels_belong_together():
    for batch in take(make(20), 10):
        assert batch.labels.tolist() == [int(image[1, 0, 0]) % 3 for image in batch.images]


def test_another_seed_is_another_order_and_other_mirrors():
    assert rows(take(make(50, seed=1), 5)) == rows(take(make(50, seed=1), 5))
    assert rows(take(make(50, seed=1), 5)) != rows(take(make(50, seed=2), 5))
    assert rows(take(make(50, seed=1), 5)) != rows(take(make(50, seed=1 + 2**32), 5))


def test_the_order_stays_from_version_to_version():
    """Golden: a change here breaks the resume of every saved run."""
    loader = make(10, seed=7)
    index, mirrored, _ = loader.lookup(np.arange(14))
    assert index.tolist() == [5, 0, 1, 6, 2, 8, 4, 9, 3, 7, 4, 6, 9, 1]
    assert mirrored.tolist() == [bool(int(c)) for c in "10001010011011"]


def test_mirror_flips_about_half_and_none_when_off():
    def flipped(**settings) -> list[bool]:
        reds = [image[0, 0].tolist() for b in take(make(100, batch=50, **settings), 8) for image in b.images]
        assert all(red in ([255, 255, 0, 0], [0, 0, 255, 255]) for red in reds)
        return [red[0] == 0 for red in reds]

    assert 140 < sum(flipped(mirror=True)) < 260
    assert sum(flipped(mirror=False)) == 0


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    group=st.integers(1, 4),
    columns=st.integers(1, 3),
    world_size=st.integers(1, 3),
    start=st.integers(0, 200),
    seed=st.integers(0, 2**40),
)
def test_ranks_together_see_the_one_process_batch(count, group, columns, world_size, start, seed):
    batch = group * columns * world_size
    shared = {"batch": batch, "group": group, "seed": seed}
    whole = take(make(count, **shared), 2, start)
    parts = [take(make(count, **shared, rank=r, world_size=world_size), 2, start) for r in range(world_size)]
    for step in range(2):
        assert sorted(rows([p[step] for p in parts])) == rows([whole[step]])
        grids = [p[step].position.reshape(group, -1) for p in parts]
        # Sample n of the whole is grouped with n + batch / group: each rank holds whole groups, in their order.
        assert torch.equal(torch.cat(grids, dim=1).ravel(), whole[step].position)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 12), start=st.integers(0, 100), later=st.integers(0, 60))
def test_resuming_anywhere_gives_the_same_continuation(count, batch, start, later):
    """Even with another batch size: position k shows the same thing."""
    uninterrupted = rows(take(make(count, batch=1), start + later + batch))
    assert rows(take(make(count, batch=batch), 1, start + later)) == uninterrupted[start + later :]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_change_nothing(folder, workers, start_method):
    images = open_dataset(folder(11), resolution=16)
    alone = rows(take(make(images), 6, 3))
    assert rows(take(make(images, workers=workers, start_method=start_method), 6, 3)) == alone


def test_set_smaller_than_the_batch():
    (batch,) = take(make(2, batch=9), 1)
    assert sorted(int(image[1, 0, 0]) for image in batch.images[:8]) == [0] * 4 + [1] * 4


def test_torch_random_numbers_are_left_alone():
    """A resumed run starts a loader anew: that must not move the generator that the run was restored to."""
    for workers in (0, 1):
        before = torch.get_rng_state()
        take(make(8, workers=workers), 2)
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_replaced_alike_and_reported(folder, workers, caplog):
    path = folder(8)
    (path / "0003.png").write_bytes(b"x")
    images = open_dataset(path, resolution=16)
    batches = take(make(images, workers=workers, batch=8), 4)
    for batch in batches:
        seen = sorted(number_of(image.numpy()) for image in batch.images)
        assert seen == [0, 1, 2, 4, 4, 5, 6, 7]
        assert batch.skipped == ["0003.png: not a PNG, JPEG, WebP or BMP image"]
    assert [r.getMessage().count("0003.png") for r in caplog.records] == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_file_limit_counts_distinct_files_over_workers(folder, workers):
    path = folder(12)
    for index in (1, 5, 9):
        (path / f"{index:04d}.png").write_bytes(b"x")
    enough = open_dataset(path, resolution=16, bad_file_limit=3)
    take(make(enough, workers=workers), 12)
    with pytest.raises(LowVRAMError, match="3 files of images cannot be used, more than bad_file_limit=2"):
        take(make(open_dataset(path, resolution=16, bad_file_limit=2), workers=workers), 12)
    assert not workers_of_this_process()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_workers_keep_their_remedy(folder, workers):
    path = folder(3)
    (path / "0001.png").write_bytes(b"x")
    with pytest.raises(LowVRAMError) as caught:
        take(make(open_dataset(path, resolution=16, on_bad_file="error"), workers=workers), 2)
    assert "0001.png of images cannot be used" in caught.value.problem
    assert "on_bad_file=skip" in caught.value.remedy


def test_enlarging_is_said_once(folder, caplog):
    take(make(open_dataset(folder(8), resolution=32), workers=2), 4)
    assert len(caplog.records) == 1 and "enlarged" in caplog.text


class Slow(Painted):
    """Takes its time for each image but the first four."""

    def load(self, index: int) -> Picture:
        time.sleep(0.5)
        return super().load(index)


def test_an_interrupt_while_waiting_ends_the_workers():
    """The traceback holds on to the DataLoader, as it does on the way up to whoever prints it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        stream = make(Slow(4), workers=1, start_method="fork").iterate(0)
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        with pytest.raises(KeyboardInterrupt) as caught:
            next(stream)
        assert caught.tb and not workers_of_this_process()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_SCRIPT = """
import os, sys, multiprocessing
from lowvram.data import Loader, open_dataset
def use(path):
    global stream
    stream = Loader(open_dataset(path, resolution=16), batch=4, seed=0, mirror=True, workers=2).iterate(0)
    next(stream)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
path, end = sys.argv[1:]
if end == "child":
    job = multiprocessing.get_context("fork").Process(target=use, args=(path,))
    job.start()
    job.join()
else:
    use(path)
if end == "raise":
    raise ValueError
if end == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["return", "raise", "child", "kill"])
def test_a_process_that_ends_with_its_stream_open_leaves_no_worker(folder, end):
    """However it ends, and within the seconds that a worker takes to see that its parent is gone."""
    job = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder(8)), end], stdout=subprocess.PIPE, text=True, timeout=60
    )
    pids = [int(word) for word in job.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and not is_zombie(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) and not is_zombie(pid) for pid in pids)


def is_zombie(pid: int) -> bool:
    """Whether an ended process waits for a parent to collect it (in a container there may be none)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("end", ["close", "drop", "error"])
def test_no_worker_outlives_its_iterator(folder, end):
    stream = make(open_dataset(folder(8), resolution=16), workers=2).iterate(0)
    next(stream)
    assert len(workers_of_this_process()) == 2
    began = time.monotonic()
    if end == "close":
        stream.close()
    elif end == "drop":
        del stream
    else:
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    assert not workers_of_this_process()
    assert time.monotonic() - began < 30  # a hang, not a slow machine


def test_workers_leave_signals_to_the_main_process(folder):
    """Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer then still finishes its step."""
    stream = make(open_dataset(folder(8), resolution=16), workers=2).iterate(0)
    next(stream)
    for worker in workers_of_this_process():
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    assert [len(next(stream)) for _ in range(20)] == [4] * 20
    stream.close()
    assert not workers_of_this_process()


def test_a_worker_that_is_killed_is_named(folder):
    stream = make(open_dataset(folder(8), resolution=16), workers=1).iterate(0)
    next(stream)
    workers_of_this_process()[0].kill()
    with pytest.raises(LowVRAMError, match="a data worker died"):
        for _ in range(100):
            next(stream)


def test_workers_use_one_thread(folder):
    """Two workers on two cores with two threads each would slow the training they serve."""

    class Told(Painted):
        def load(self, index: int) -> Picture:
            return Picture(np.full((4, 4, 3), torch.get_num_threads(), np.uint8))

    (batch,) = take(make(Told(4), workers=1, start_method="fork"), 1)
    assert (batch.images == 1).all()


def test_without_shared_memory_the_same_batches(folder, monkeypatch):
    images = open_dataset(folder(8), resolution=16)
    alone = rows(take(make(images), 4))
    monkeypatch.setattr(loader, "_shared_memory_holds", lambda size: False)
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", None)  # would be called for a tensor
    assert rows(take(make(images, workers=1, start_method="fork"), 4)) == alone


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 6, "group": 4}, "batch=6 cannot be cut into groups of 4 over 1 processes"),
        ({"batch": 4, "group": 2, "world_size": 4}, "batch=4 cannot be cut into groups of 2 over 4"),
        ({"batch": 0}, "batch=0"),
        ({"workers": -1}, "data.workers=-1"),
        ({"rank": 1}, "rank=1"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(LowVRAMError) as caught:
        make(5, **wrong)
    assert said in caught.value.problem and caught.value.remedy


def test_builtin_faces_stream(tmp_path):
    images = open_dataset(None, resolution=32, labels=True, builtin_count=10)
    batches = take(make(images, workers=2), 5)
    assert len({row[2] for row in rows(batches)}) >= 10
    assert all(0 <= label < 7 for batch in batches for label in batch.labels.tolist())
