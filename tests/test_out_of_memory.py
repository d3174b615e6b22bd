"""Memory runs out at every kind of point of a training, and what comes out is what comes out without.

Faults are raised by hooks, in torch's own words. The reference is the same training without a fault. Where what was
done about it leaves the micro-batches as they were, everything must be bit-identical.
"""

import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment
from faults import (
    MESSAGE,
    WANTED,
    Fault,
    Install,
    Means,
    Momentum,
    Result,
    assert_same,
    averaging,
    backward_of,
    backward_of_a_module,
    copying_for_a_redo,
    finish_of,
    first_derivative,
    forward_of,
    gathering,
    grid,
    more_than,
    settling,
    terms_of,
    train,
    update_of,
    writing,
)
from seeds import for_one_of_the_seeds
from small_unet import BATCH, noise_phase, pictures, unet
from test_equivalence import CALM, REORDERED, largest_difference, weights
from tiny import TINY
from torch import Tensor, nn

from lowvram import Trainer, load_recipe
from lowvram.ema import ExponentialMovingAverage
from lowvram.errors import LowVRAMError
from lowvram.evaluate import evaluate
from lowvram.memory import optimizer_classes, optimizers
from lowvram.memory.apply import Applied, apply
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.memory.rescue import Rescue
from lowvram.metrics import evaluation
from lowvram.sample import all_frames, sample_batches
from lowvram.tasks import Task

# The smallest micro-batches for which the ladder has a cheaper step, one that changes no order of additions.
SMALL = ("micro_batch.G=4", "micro_batch.path_length=4", "micro_batch.D=4", "micro_batch.R1=4")
POLICIES = {
    "plain": (),
    "deferred": ("memory.update.G=deferred", "memory.update.D=deferred"),
    "streamed": (
        "memory.weights.G=stream", "memory.update.G=deferred", "memory.weights.D=stream", "memory.update.D=deferred",
    ),
    "state on the host": ("memory.state.G=host", "memory.state.D=host"),
    "8 bits": ("memory.optimizer.G=adam8bit", "memory.optimizer.D=adam8bit"),
    "offload": tuple(f"memory.activations.{phase}=offload" for phase in ("G", "path_length", "D", "R1")),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Each fault collects garbage: let it look only at what these tests make."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The training of some settings without a fault."""

    @cache
    def make(*words: str) -> Result:
        out = tmp_path_factory.mktemp("reference") / "run"
        return train(load_recipe("faces32", [*TINY, f"out={out}", *CALM, *words]))

    return make


# At every kind of point. The first step has all four phases and no fault, the second G and D, the third all.
POINTS: dict[str, list[tuple[Install, Fault]]] = {
    "forward": [
        (forward_of("G"), Fault(phase="G")),
        (forward_of("D"), Fault(phase="G", at=(4,))),
        (forward_of("G"), Fault(phase="path_length")),
        (forward_of("G"), Fault(phase="D")),  # without gradients
        (forward_of("D"), Fault(phase="D", at=(6,))),
        (forward_of("D"), Fault(phase="R1", at=(2,))),
    ],
    "backward": [
        (backward_of("G"), Fault(phase="G", at=(2,))),
        (backward_of("G"), Fault(phase="path_length")),
        (backward_of("D"), Fault(phase="D", at=(3, 7))),
        (backward_of("D"), Fault(phase="R1", at=(2,))),
    ],
    "backward of modules": [
        (backward_of_a_module, Fault(phase="D", at=(3,))),
        (first_derivative, Fault(phase="R1", at=(2,))),
    ],
    "between terms and micro-batches": [
        (terms_of("G"), Fault(at=(2, 5))),
        (terms_of("D"), Fault(at=(2, 9))),
        (terms_of("path_length"), Fault(at=(2,))),
        (terms_of("R1"), Fault(at=(3,))),
    ],
    "before the optimizer steps": [
        (update_of("G", "before"), Fault(at=(1, 3))),
        (update_of("G", "before"), Fault(phase="path_length", at=(1, 2))),
        (update_of("D", "before"), Fault(phase="D", at=(2,))),
        (update_of("D", "before"), Fault(phase="R1")),
    ],
    "after the optimizer stepped": [
        (update_of("G", "after"), Fault(at=(1, 2))),
        (update_of("G", "after"), Fault(phase="path_length")),
        (update_of("D", "after"), Fault(phase="D", at=(2,))),
        (update_of("D", "after"), Fault(phase="R1")),
    ],
    "around a step": [
        (copying_for_a_redo, Fault(at=(2, 3))),
        (finish_of("G"), Fault(at=(2,))),
        (finish_of("path_length"), Fault()),
        (settling, Fault()),
        (averaging, Fault(at=(1,))),
    ],
    "saving": [
        (grid, Fault()),
        (gathering, Fault(at=(2,))),
        (writing, Fault()),
    ],
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("where", POINTS)
def test_faults_change_nothing(where: str, tiny: Callable[..., object], reference: Callable[..., Result]) -> None:
    faults = [(install, replace(fault)) for install, fault in POINTS[where]]
    got = train(tiny(*CALM, *SMALL), *faults)
    assert_same(got, reference(*SMALL))
    assert len(got.said) == sum(len(fault.at) for _, fault in faults)
    assert all(WANTED in line for line in got.said)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_nor_under_another_policy(policy: str, tiny: Callable[..., object], reference: Callable[..., Result]) -> None:
    words = (*SMALL, *POLICIES[policy])
    got = train(
        tiny(*CALM, *words),
        (forward_of("G"), Fault(phase="G")),
        (terms_of("D"), Fault(at=(4,))),
        (backward_of("D"), Fault(phase="R1", at=(2,))),
        (update_of("G", "before"), Fault(at=(2,))),
        (update_of("D", "after"), Fault(at=(1,))),
    )
    assert_same(got, reference(*words))
    assert len(got.said) == 5


@pytest.mark.parametrize("name", ["G", "D"])
def test_nor_in_the_updates_that_streamed_blocks_wait_for(
    name: str, tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    """When a block is loaded in a forward of either network's phase, and when all are settled."""
    words = (*SMALL, *POLICIES["streamed"])
    before, after = Fault(at=(1, 4)), Fault(at=(2, 3))
    got = train(tiny(*CALM, *words), (update_of(name, "before"), before), (update_of(name, "after"), after))
    assert_same(got, reference(*words))
    assert len(got.said) == 4
    assert any("the step is done again" in line for line in got.said)


@pytest.mark.parametrize("times", [1, 3])
def test_smaller_micro_batches_change_no_more_than_the_order_of_sums(
    times: int, tiny: Callable[..., object], reference: Callable[..., Result], tmp_path: Path
) -> None:
    phases = {"G": "G", "path_length": "G", "D": "D", "R1": "D"}
    at = tuple(range(1, times + 1))

    def check(seed: int) -> None:
        faults = [(backward_of(network), Fault(phase=name, at=at)) for name, network in phases.items()]
        got = train(tiny(*CALM, f"seed={seed}", f"out={tmp_path / str(seed)}"), *faults)
        assert len(got.said) == 4 * times
        for name in ("G", "D", "R1", *(["path_length"] if times > 1 else [])):  # path length is offloaded first
            assert sum(f"micro_batch.{name}: " in line for line in got.said) >= 1
        assert_same(got, reference(f"seed={seed}"), REORDERED)

    for_one_of_the_seeds(check)


# Faults without end, or where nothing can be redone.


@pytest.mark.parametrize("phase", ["G", "path_length"])
def test_the_whole_ladder_and_its_end(phase: str, tiny: Callable[..., object]) -> None:
    trainer = Trainer(tiny(*CALM), quiet=True)
    said: list[str] = []
    trainer.rescue.say = said.append
    fault = Fault(at=tuple(range(1, 100)))
    (forward_of("G") if phase == "G" else backward_of("G"))(trainer, fault)
    trainer.task.phases = [p for p in trainer.task.phases if p.name == phase]
    before = weights(trainer)
    with closing(trainer.loader.iterate(0)) as batches, pytest.raises(LowVRAMError) as caught:
        trainer.train_step(next(batches))
    own = {
        "G": ["micro_batch.G: 8 -> 4", "memory.activations.G: keep -> recompute"],
        "path_length": [
            "memory.activations.path_length: keep -> offload",
            "micro_batch.path_length: 4 -> 2",
            "micro_batch.path_length: 2 -> 1",
        ],
    }[phase]
    steps = [*own, "memory.state.G: device -> host", "memory.state.D: device -> host", "memory.ema: device -> host"]
    where = f"out of memory in phase {phase} ({WANTED})"
    assert said == [f"{where}: {step}; the step is done again" for step in steps]
    problem = str(caught.value)
    assert f"{where}, and no thriftier policy is left." in problem
    (gigabytes,) = re.findall(r"About ([\d.]+)GB would do", problem)
    assert 2 < float(gigabytes) < 50  # what was held, and the 2 GiB that were wanted
    assert caught.value.__context__ is None  # nothing that would hold the failed try's tensors
    assert largest_difference(weights(trainer), before) == 0


def test_an_update_is_tried_again_and_then_given_up(tiny: Callable[..., object]) -> None:
    trainer = Trainer(tiny(*CALM), quiet=True)
    said: list[str] = []
    trainer.rescue.say = said.append
    update_of("G", "before")(trainer, Fault(at=tuple(range(1, 100))))
    where = rf"out of memory in the update of phase G \({WANTED}\)"
    with closing(trainer.loader.iterate(0)) as batches, pytest.raises(LowVRAMError, match=f"{where}, and no thriftier"):
        trainer.train_step(next(batches))
    assert [line.split("): ")[1] for line in said] == ["caches freed, going on", "memory.ema: device -> host, going on"]


def test_a_fused_update_can_not_be_redone_and_says_so(tiny: Callable[..., object]) -> None:
    trainer = Trainer(tiny(*CALM, "memory.update.G=fused"), quiet=True)
    update_of("G", "after")(trainer, Fault())
    with closing(trainer.loader.iterate(0)) as batches, pytest.raises(LowVRAMError) as caught:
        trainer.train_step(next(batches))
    assert "memory.update.G=fused changed weights before this step failed: it can't be redone" in str(caught.value)
    assert "last checkpoint with memory.update.G=deferred, which is exact" in str(caught.value)


def test_before_it_begins_a_fused_update_is_redone_and_becomes_deferred(
    tiny: Callable[..., object], reference: Callable[..., Result]
) -> None:
    got = train(tiny(*CALM, "memory.update.G=fused"), (forward_of("G"), Fault(phase="G", at=(1, 2))))
    assert [line.split(": ", 1)[1] for line in got.said] == [
        "memory.activations.G: keep -> recompute; the step is done again",
        "memory.update.G: fused -> deferred; the step is done again",
    ]
    assert_same(got, reference("memory.update.G=fused"))


@pytest.mark.slow
def test_one_of_several_processes_refuses(tmp_path: Path) -> None:
    """The others wait for it: an error, and not a deadlock."""
    script = tmp_path / "train_with_a_fault.py"
    script.write_text(
        "import sys, torch\n"
        "from lowvram import Trainer, load_recipe\n"
        "trainer = Trainer(load_recipe('faces32', sys.argv[1:]))\n"
        "def fault(*_):\n"
        f"    raise torch.OutOfMemoryError({MESSAGE!r})\n"
        "if trainer.rank == 1:\n"
        "    trainer.task.D.register_forward_hook(fault)\n"
        "trainer.fit()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launch, *TINY, "out=run", "kimg=0.016"],
        cwd=tmp_path, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=120,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"out of memory in phase G ({WANTED}) in one of 2 processes" in done.stderr
    assert "Go on from the last checkpoint with a smaller micro_batch.G" in done.stderr


# Plain modules under a policy, without the trainer.


def train_unet(
    policy: MemoryPolicy, strike: Callable[[Applied], object] | None = None, **changes: object
) -> dict[str, Tensor]:
    """Three steps of the small UNet, the first of them before the fault; its weights and optimizer state."""
    network = unet()
    phase = noise_phase(network, **changes)
    if "optimizer" in changes:
        phase.optimizer = changes["optimizer"](network.parameters())
    applied = apply(policy, [phase], device="cpu", seed=3)
    said: list[str] = []
    rescue = Rescue(applied, phase.networks, said.append)
    for index, images in enumerate(pictures(3)):
        if index == 1 and strike is not None:
            strike(applied)
        loss, _ = rescue.redo(phase, partial(gradients_of, applied, phase, images, index))
        rescue.resume(phase, partial(applied.update, phase, loss))
    rescue.again("settling", applied.settle)
    assert len(said) == (strike is not None)
    tensors = {key: tensor.detach().float() for key, tensor in network.state_dict().items()}
    return tensors | {f"optimizer {k}": t.float() for k, t in applied.updater(phase).state()[0].items()}


def gradients_of(applied: Applied, phase: Any, images: Tensor, index: int) -> tuple[Tensor, dict[str, Tensor]]:
    labels, positions = torch.full((BATCH,), -1), torch.arange(BATCH) + index * BATCH
    with applied.running(phase):
        return applied.accumulate(phase, phase.micro_batches(images, labels, positions, index * BATCH, 0))


def unet_policy(precision: str = "fp32", **optimizer: object) -> MemoryPolicy:
    """With the smallest micro-batch, so that to do a step again changes no order of additions."""
    optimizers = {"denoise": OptimizerPolicy(**optimizer)}
    return MemoryPolicy(precision=precision, phases={"denoise": PhasePolicy(micro_batch=1)}, optimizers=optimizers)


@pytest.mark.parametrize(
    "policy",
    [
        unet_policy(weights_dtype="bf16", state="host"),
        unet_policy(weights_dtype="bf16", update="deferred", weights="stream"),
    ],
    ids=["resident", "streamed"],
)
def test_bf16_weights_whose_rounding_ran_out_of_memory(policy: MemoryPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is done and the rounding is left: neither may be lost, and the random numbers are the same."""
    fault = Fault(at=(30,))
    got = train_unet(
        policy,
        lambda _: monkeypatch.setattr(optimizers, "stochastic_round_", fault.before(optimizers.stochastic_round_)),
    )
    assert fault.raised == 1
    assert largest_difference(got, train_unet(policy)) == 0


def test_an_adafactor_that_stops_midway_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """It allocates between its first and its last change."""
    fault = Fault(at=(20,))
    got = train_unet(
        unet_policy(kind="adafactor"),
        lambda _: monkeypatch.setattr(optimizer_classes, "_adafactor", fault.before(optimizer_classes._adafactor)),
    )
    assert fault.raised == 1
    assert largest_difference(got, train_unet(unet_policy(kind="adafactor"))) == 0


def test_nor_does_an_optimizer_of_another_class_change_weights_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(at=(50,))
    got = train_unet(MemoryPolicy(), lambda _: monkeypatch.setattr(Momentum, "strike", fault), optimizer=Momentum)
    assert fault.raised == 1
    assert largest_difference(got, train_unet(MemoryPolicy(), optimizer=Momentum)) == 0


def test_a_loss_scale_grows_once_for_each_step() -> None:
    """A decision has to wait for the update before it, of blocks that were not used since: it may fail there."""

    def run(fault: Fault) -> tuple[dict[str, Any], list[Tensor]]:
        phase = noise_phase(unet())
        applied = apply(unet_policy("fp16", update="deferred", weights="stream"), [phase], device="cpu")
        updater = applied.updater(phase)
        assert updater.scale is not None
        updater.scale.growth_every = 2
        block, rest = next(iter(updater.buckets.values())), updater.buckets["rest"]
        block.parts[0].optimizer.register_step_pre_hook(fault)
        rescue = Rescue(applied, phase.networks, lambda _: None)
        for buckets in ([block, rest], [rest], [rest]):  # those that get gradients
            for param in (param for bucket in buckets for param in bucket.params):
                updater._send_to_host(param, torch.full_like(param, 0.5))
            rescue.resume(phase, partial(applied.update, phase, torch.tensor(1.0)))
        applied.settle()
        return updater.scale.state(), [param.detach().clone() for param in updater.params]

    fault = Fault()
    (got, weights), (wanted, wanted_weights) = run(fault), run(Fault(at=()))
    assert fault.raised == 1
    assert got == wanted
    assert all(torch.equal(one, other) for one, other in zip(weights, wanted_weights, strict=True))


def test_an_average_that_stops_midway_goes_on_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 weights, one is brought to fp32 at a time."""

    def run(fault: Fault) -> list[Tensor]:
        torch.manual_seed(0)
        source, target = nn.Linear(4, 4).to(torch.bfloat16), nn.Linear(4, 4)
        average = ExponentialMovingAverage(source, target, half_life_kimg=0.01, rampup=None)
        phase = noise_phase(source, samples=1)
        rescue = Rescue(apply(MemoryPolicy(), [phase], device="cpu"), [source], lambda _: None)
        move = average._scratch.bring

        def bring(wanted: Any) -> Iterator[Tensor]:
            for new in move(wanted):
                fault()
                yield new

        monkeypatch.setattr(average._scratch, "bring", bring)
        for images_seen in (8, 16):
            rescue.again("the average", partial(average.update, images_seen, 8))
        return list(target.parameters())

    fault = Fault(at=(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(run(fault), run(Fault(at=())), strict=True))
    assert fault.raised == 2


# Sampling and evaluation.


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    out = tmp_path_factory.mktemp("sampled") / "run"
    return Trainer(load_recipe("faces32", [*TINY, f"out={out}", "data.mirror=false"]), quiet=True).task


@pytest.fixture
def small_card(task: Task) -> Iterator[Task]:
    """A task that can make two images at a time."""
    handle = task.networks["G_ema"].synthesis.register_forward_hook(more_than(2))
    yield task
    handle.remove()


def same_images(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and int((one.int() - other.int()).abs().max()) <= 1


def test_the_trainer_samples_in_smaller_slices(tiny: Callable[..., object]) -> None:
    trainer = Trainer(tiny(), quiet=True)
    said: list[str] = []
    trainer.rescue.say = said.append
    wanted = trainer.sample(11, seed=4)
    handle = trainer.task.G_ema.synthesis.register_forward_hook(more_than(2))
    assert same_images(trainer.sample(11, seed=4), wanted)
    assert said[-1] == f"out of memory in sampling ({WANTED}): 2 at a time from here on"
    said.clear()
    assert same_images(trainer.sample(11, seed=4, micro_batch=5), wanted)
    assert [line.split("): ")[1] for line in said] == ["2 at a time from here on"]
    handle.remove()
    trainer.task.G_ema.synthesis.register_forward_hook(more_than(0))
    with pytest.raises(LowVRAMError, match=rf"out of memory in sampling \({WANTED}\)[^$]*GB would do"):
        trainer.sample(3)


def test_the_sample_command_goes_on_with_fewer_at_a_time(small_card: Task, capsys: pytest.CaptureFixture[str]) -> None:
    batches = list(sample_batches(small_card, 11, 4, batch=8))
    assert [len(batch) for batch in batches] == [8, 3]
    assert capsys.readouterr().err.count("out of memory in sampling") == 2  # 8 -> 4 -> 2, and 2 from then on
    assert same_images(torch.cat(batches), small_card.sample(11, 4, micro_batch=2))


def test_an_animation_goes_on_where_it_was(small_card: Task, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"keyframes": 2, "frames_per_keyframe": 2, "rows": 2, "cols": 2}
    wanted = torch.stack(list(small_card.interpolate(3, micro_batch=2, **options)))
    frames = list(all_frames(small_card, 3, walks=4, micro_batch=None, **options))
    assert same_images(torch.stack(frames), wanted)
    assert "out of memory in the animation" in capsys.readouterr().err

    late = Fault(at=(5,))  # in the third frame, of two slices each
    handle = small_card.networks["G_ema"].synthesis.register_forward_hook(late)
    frames = list(all_frames(small_card, 3, walks=4, micro_batch=2, **options))
    handle.remove()
    assert same_images(torch.stack(frames), wanted)
    assert late.raised == 1


def test_evaluation_goes_on_with_fewer_at_a_time(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measure(most: int, folder: str) -> tuple[dict[str, float], Means]:
        monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / folder))
        extractor = Means(most)
        monkeypatch.setattr(evaluation, "EfficientNetLite0", lambda device, size: extractor)
        result = evaluate(task, n=40, metrics=["frechet", "precision_recall"], progress=False)
        return {**result.values, **{f"floor {k}": v for k, v in result.floor.items()}}, extractor

    wanted, whole = measure(1000, "a")
    assert set(whole.sizes) == {40} and "out of memory" not in capsys.readouterr().err
    handle = task.networks["G_ema"].synthesis.register_forward_hook(more_than(2))
    got, sliced = measure(12, "b")
    handle.remove()
    assert got == pytest.approx(wanted, rel=1e-2)  # a pixel may round the other way
    assert set(sliced.sizes) == {10} and sum(sliced.sizes) == 80
    said = capsys.readouterr().err
    assert said.count("out of memory in taking features") == 2  # 40 -> 20 -> 10
    assert "out of memory in sampling" in said
    with pytest.raises(LowVRAMError, match="out of memory in taking features"):
        measure(0, "c")
