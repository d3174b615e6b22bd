"""Recorded pieces: the same by the short way as by torch's own, at any batch from one recording, and put together.

What a whole policy needs is held against `planned.peaks`: the machinery itself, running that policy on fake tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from planned import Builder, Transformer, classifier, peaks, resnet, small_unet, stylegan2

from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.planner import cards, record
from lowvram.planner.compose import Taking, flow, highest
from lowvram.planner.estimate import Estimator
from lowvram.planner.pieces import Pieces
from lowvram.planner.record import Piece
from lowvram.planner.tracing import Job, Structure

BF16 = Structure(precision="bf16")
GAN = stylegan2("augment.mode=none", "batch=8", "resolution=16")
NETWORKS: dict[str, tuple[Builder, Structure, str]] = {
    "UNet in bf16": (small_unet(8), BF16, "denoise"),
    "ResNet": (classifier(resnet, 8), Structure(), "classify"),
    "transformer in bf16": (classifier(Transformer, 8), BF16, "classify"),
}
PHASES = [
    ("G", "keep"),
    ("G", "recompute"),
    ("D", "keep"),
    ("D", "offload"),
    ("path_length", "keep"),
    ("R1", "offload"),
]
SECOND_ORDER = ("path_length", "R1")


@contextmanager
def recorded(build: Builder) -> Iterator[Pieces]:
    """Pieces recorded in this process."""
    with Pieces(build, processes=1) as pieces:
        yield pieces


def assert_same(one: Piece, other: Piece) -> None:
    """Every storage and every operation, in order; numbers to the last byte and flop."""
    for name in ("order", "sizes", "categories", "makers"):
        np.testing.assert_array_equal(np.round(getattr(one, name)), getattr(other, name), err_msg=name)
    for name in ("flops", "bytes", "kinds", "half"):
        np.testing.assert_array_equal(np.round(getattr(one.work, name)), getattr(other.work, name), err_msg=name)
    assert round(one.work.host_bytes) == other.work.host_bytes
    assert (one.names, one.arrivals, one.left) == (other.names, other.arrivals, other.left)


# By the short way.


def both_ways(build: Builder, jobs: list[Job]) -> None:
    """Record jobs by the short way, and by FakeTensorMode alone."""
    with recorded(build) as pieces:
        quick = [pieces.get(job).piece for job in jobs]
    with mock.patch.object(record, "QUICK", False), recorded(build) as pieces:
        usual = [pieces.get(job).piece for job in jobs]
    for one, other in zip(quick, usual, strict=True):
        assert len(one.order) > 40
        assert_same(one, other)


@pytest.mark.slow
def test_stylegan2_is_recorded_quickly_and_the_same() -> None:
    jobs = [
        Job(structure=Structure(), what="phase", name=name, samples=8, activations=activations)
        for name, activations in PHASES
    ]
    both_ways(GAN, [*jobs, Job(structure=Structure(), what="sample", samples=4)])


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks_are_recorded_quickly_and_the_same(name: str) -> None:
    build, structure, phase = NETWORKS[name]
    own = OptimizerPolicy(kind="adafactor")
    update = Job(structure=structure, what="update", name=phase, optimizer=own)
    both_ways(build, [Job(structure=structure, what="phase", name=phase, samples=8), update])


@pytest.mark.slow
def test_all_of_faces32_is_recorded_quickly_and_the_same() -> None:
    jobs = [
        Job(structure=Structure(), what="phase", name=name, samples=8, activations=activations)
        for name in ("G", "path_length", "D", "R1")
        for activations in ("keep", "recompute", "offload")
        if not (name in SECOND_ORDER and activations == "recompute")
    ]
    both_ways(stylegan2(), jobs)


# Whose work it is.


@pytest.mark.parametrize(("name", "network"), [("D", "D"), ("path_length", "G"), ("R1", "D")])
def test_a_backward_is_put_down_to_the_modules_of_its_forward(name: str, network: str) -> None:
    """That of a second derivative too, whose nodes the first backward made; and no module is empty."""
    with recorded(GAN) as pieces:
        piece = pieces.get(Job(structure=Structure(), what="phase", name=name, samples=8)).piece
    backward = {n: maker.partition(" in ")[2] for n, maker in enumerate(piece.names) if maker.endswith(", backward")}
    size_bytes = dict.fromkeys(backward.values(), 0.0)
    for size, maker in zip(piece.sizes, piece.makers, strict=True):
        if maker in backward:
            size_bytes[backward[maker]] += size
    assert all(place.split(", ")[0] for place in size_bytes)
    blocks = {place.split(".b")[1].split(".")[0].split(",")[0] for place in size_bytes if ".b" in place}
    assert blocks == {"16", "8", "4"}
    mine = sum(size for place, size in size_bytes.items() if place.startswith(f"{network}."))
    assert mine > 0.97 * sum(size_bytes.values())  # the rest is the loss's own arithmetic


# At any batch.


def every_batch(build: Builder, structure: Structure, name: str, group: int, batches: tuple[int, ...]) -> None:
    """Hold the pieces of some batches against what the one of a very large batch makes of them."""
    with recorded(build) as pieces:
        for activations in ("keep",) if name in SECOND_ORDER else ("keep", "recompute"):
            for n in batches:
                assert n >= max(8, 2 * group)
                job = Job(structure=structure, what="phase", name=name, samples=n, activations=activations)
                assert_same(pieces.like(job, group).piece, pieces.get(job).piece)
        assert len(pieces._recorded) == (len(batches) + 1) * (1 if name in SECOND_ORDER else 2)


@pytest.mark.parametrize("name", ["G", "path_length", "D", "R1"])
def test_one_recording_gives_every_batch_of_stylegan2(name: str) -> None:
    every_batch(GAN, Structure(), name, 1 if name == "path_length" else 4, (8, 24))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_recording_gives_every_batch_of_other_networks(name: str) -> None:
    build, structure, phase = NETWORKS[name]
    # diffusers' upsampling copies its map from 64 samples on: below, that copy is counted too (next test).
    every_batch(build, structure, phase, 1, (99,) if phase == "denoise" else (8, 9, 40))


def test_code_that_asks_for_the_batch_changes_no_peak() -> None:
    with recorded(small_unet(8)) as pieces:
        for n in (8, 24):
            job = Job(structure=Structure(), what="phase", name="denoise", samples=n)
            like, direct = pieces.like(job, 1).piece, pieces.get(job).piece
            assert len(like.order) > len(direct.order)
            assert flow(like, Taking()).peak_bytes() == flow(direct, Taking()).peak_bytes()
            assert round(like.work.flops.sum()) == direct.work.flops.sum()


# Put together.


def gan(micro: int | None = None, activations: str = "keep", second: str = "keep", **own: str) -> MemoryPolicy:
    """A policy for all phases and both optimizers; ema among `own`."""
    ema = own.pop("ema", "device")
    phases = {
        name: PhasePolicy(micro_batch=micro, activations=second if name in SECOND_ORDER else activations)
        for name in ("G", "path_length", "D", "R1")
    }
    return MemoryPolicy(phases=phases, optimizers=dict.fromkeys(("G", "D"), OptimizerPolicy(**own)), ema=ema)


def unet(micro: int | None = None, activations: str = "keep", precision: str = "fp32", **own: str) -> MemoryPolicy:
    """A policy for the phase of the UNet."""
    phases = {"denoise": PhasePolicy(micro_batch=micro, activations=activations)}
    return MemoryPolicy(precision=precision, phases=phases, optimizers={"denoise": OptimizerPolicy(**own)})


STREAMED = {"weights": "stream", "update": "deferred", "state": "host"}
SMALL_UNET = small_unet(4)
POLICIES: dict[str, tuple[Builder, MemoryPolicy]] = {
    "UNet fused, recomputed, on the host": (SMALL_UNET, unet(None, "recompute", update="fused", state="host")),
    "UNet by two, deferred, bf16": (SMALL_UNET, unet(2, precision="bf16", update="deferred")),
}
LONG: dict[str, tuple[Builder, MemoryPolicy]] = {
    "GAN whole": (GAN, gan()),
    "GAN by four, recomputed, offloaded, deferred": (GAN, gan(4, "recompute", "offload", update="deferred")),
    "GAN deferred": (GAN, gan(update="deferred")),
    "GAN by four": (GAN, gan(4)),
    "GAN by four, offloaded": (GAN, gan(4, "offload", "offload", ema="host")),
    "GAN streamed by four": (GAN, gan(4, second="offload", **STREAMED)),
    "GAN by four, deferred, in 8 bits on the host": (
        GAN,
        gan(4, "recompute", "offload", update="deferred", state="host", kind="adam8bit", ema="host"),
    ),
    "GAN streamed whole": (GAN, gan(second="offload", ema="host", **STREAMED)),
    "faces32 by four": (stylegan2(), gan(4, "recompute", "offload")),
    "UNet fused, Lion": (SMALL_UNET, unet(update="fused", kind="lion8bit")),
    "UNet by one": (SMALL_UNET, unet(1)),
    "UNet fused": (SMALL_UNET, unet(update="fused")),
    "UNet by two, offloaded, Adafactor": (SMALL_UNET, unet(2, "offload", kind="adafactor")),
    "UNet streamed by two, bf16": (SMALL_UNET, unet(2, precision="bf16", **STREAMED)),
    "UNet streamed": (SMALL_UNET, unet(**STREAMED)),
}
BELOW, ABOVE = 0.0005, 0.005
REPORTED_BYTES = 12 * 512  # of earlier micro-batches: losses, signs, and means of small images for the signs of trouble


@pytest.mark.parametrize("name", [*POLICIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_a_composed_policy_is_what_the_machinery_needs(name: str) -> None:
    """Phases to 0.05% and mostly to the byte: what earlier micro-batches reported is missing."""
    build, policy = {**POLICIES, **LONG}[name]
    with recorded(build) as pieces:
        estimator = Estimator(pieces, Structure.of(policy), cards.find("RTX 3060"))
        estimator.settle(policy)
        parts = {part: found.live_bytes for part, found in highest(estimator.requests(policy)).items()}
    # A second step finds what the first one made: tables of 8 bits, a stream's slots.
    narrow = any(own.kind.endswith("8bit") or own.weights == "stream" for own in policy.optimizers.values())
    direct = peaks(build, policy, steps=2 if narrow else 1)
    assert set(direct) <= set(parts)
    assert max(parts.values()) >= max(direct.values()) * (1 - BELOW) - REPORTED_BYTES
    assert max(parts.values()) <= max(direct.values()) * (1 + ABOVE)
    streams = any(own.weights == "stream" for own in policy.optimizers.values())
    for part, live_bytes in direct.items():
        assert parts[part] >= live_bytes * (1 - BELOW) - REPORTED_BYTES, part
        # Between steps a stream's slots may be gone, and are counted all the same; that is no step's peak.
        if not (streams and part in ("average", "sampling")):
            assert parts[part] <= live_bytes * (1 + ABOVE), part
    count = min((own.micro_batch or 99 for own in policy.phases.values()), default=99)
    if count == 99 and not streams:
        assert {part: parts[part] for part in direct} == dict(direct)


def test_pieces_price_no_phase_below_its_composition() -> None:
    """What a search compares (peaks of parts beside residents) is what the composition of the whole step shows."""
    with recorded(SMALL_UNET) as pieces:
        for policy in (unet(2), unet(update="fused"), unet(2, update="deferred")):
            estimator = Estimator(pieces, Structure.of(policy), cards.find("RTX 3060"))
            (phase,) = estimator.facts.phases
            own = policy.optimizer("denoise")
            choice = (policy.phase("denoise").micro_batch or 4, "keep", 1)
            held = sum(-(-size // 512) * 512 for _, size in estimator.residents({"denoise": own}, "device"))
            price = max(estimator.phase(phase, choice, own).peak_bytes, estimator.update("denoise", own).peak_bytes)
            assert held + price == highest(estimator.requests(policy))["denoise"].live_bytes, policy
