"""Traced bytes against hand counts, and against what torch's allocator really gave.

By hand: an MLP of two layers under every optimizer, update and micro-batch. All formulas are written out, from the
shapes alone; a size is rounded up to 512 bytes as the allocator does.

The allocator is the CPU's: phases of real networks are run with real numbers, and torch's profiler reads its log.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from allocated import Peaks, peaks_of
from planned import (
    Builder,
    Transformer,
    as_on_a_cpu,
    classifier,
    resnet,
    small_unet,
    stylegan2,
    subject,
    unrounded_peak,
)
from torch import Tensor, nn

from lowvram.memory.apply import Applied
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy, PhasePolicy
from lowvram.phase import MicroBatch, Phase
from lowvram.planner import cards
from lowvram.planner.compose import highest
from lowvram.planner.estimate import Estimator
from lowvram.planner.log import ACTIVATIONS, GRADIENTS, GRAIN_BYTES, OPTIMIZER, WEIGHTS
from lowvram.planner.pieces import Pieces
from lowvram.planner.subject import Subject
from lowvram.planner.tracing import Job, Structure

INPUTS, HIDDEN, OUTPUTS = 64, 96, 48  # either matrix has more than the 4096 elements from which on 8 bits are used
BATCHES = {"activations dominate": 2048, "weights dominate": 8}
S = GRAIN_BYTES  # a scalar

Like = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LIKES: dict[str, Like] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, betas=(0.9, 0.99)),
    "Adam without first moment": lambda p: torch.optim.Adam(p, betas=(0.0, 0.99)),
    "AdamW": lambda p: torch.optim.AdamW(p, betas=(0.9, 0.99)),
}


def r(size_bytes: int) -> int:
    """Rounded up as the allocator does."""
    return -(-size_bytes // GRAIN_BYTES) * GRAIN_BYTES


def mlp(like: Like, *, bias: bool, batch: int) -> Callable[[], Subject]:
    """Two linear layers with a ReLU between, and the mean square of what comes out."""

    def build() -> Subject:
        network = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=bias), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS, bias=bias))

        def loss(micro: MicroBatch) -> Tensor:
            return network(micro.images).square().mean()

        optimizer = like(list(network.parameters()))
        phase = Phase(name="fit", networks=(network,), optimizer=optimizer, loss=loss, samples=batch)
        return subject([phase], (INPUTS,), dtype=torch.float32)

    return build


@dataclass(frozen=True, kw_only=True)
class Hand:
    """The MLP by hand. shapes: of weights and biases, in order."""

    bias: bool
    like: str
    kind: str
    update: str
    on_host: bool

    @property
    def layers(self) -> list[list[tuple[int, ...]]]:
        """Shapes of the first and of the second layer."""
        first: list[tuple[int, ...]] = [(HIDDEN, INPUTS), (HIDDEN,)]
        second: list[tuple[int, ...]] = [(OUTPUTS, HIDDEN), (OUTPUTS,)]
        return [first[: 1 + self.bias], second[: 1 + self.bias]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all parameters."""
        return [shape for layer in self.layers for shape in layer]

    def weights_bytes(self) -> int:
        """Of all; gradients have as many."""
        return sum(r(4 * elements(shape)) for shape in self.shapes)

    # State.

    def state_bytes(self) -> int:
        """What the optimizer keeps between steps, wherever."""
        return sum(self._state_of(shape) for shape in self.shapes) + self.tables_bytes()

    def tables_bytes(self) -> int:
        """Two kinds of 256 levels and bounds; 12 numbers a parameter, and one for each 2048 elements. On the device."""
        if not self.kind.endswith("8bit"):
            return 0
        groups = [[shape] for shape in self.shapes] if self.update == "fused" else [self.shapes]
        programs = [sum(-(-elements(shape) // 2048) for shape in group) for group in groups]
        return sum(
            r(4 * 2 * 512) + r(8 * 12 * len(g)) + r(4 * count) for g, count in zip(groups, programs, strict=True)
        )

    @staticmethod
    def chunk_bytes(shapes: list[tuple[int, ...]]) -> int:
        """Without Triton: six temporaries of the largest tensor in blocks of 256, and 32 bytes an element to spare."""
        longest = max(-(-elements(shape) // 256) * 256 for shape in shapes)
        return 6 * r(4 * longest) + r(32 * longest)

    def _moments(self) -> int:
        return 1 if self.kind == "lion8bit" or self.like == "Adam without first moment" else 2

    def _state_of(self, shape: tuple[int, ...]) -> int:
        n = elements(shape)
        if self.kind.endswith("8bit"):
            narrow = r(n) + r(4 * -(-n // 256))  # a byte each, and a scale for each 256
            return self._moments() * (narrow if n >= 4096 else r(4 * n))
        if self.kind == "adafactor":  # by row and column of a matrix
            return sum(r(4 * side) for side in shape)
        if self.like.startswith("SGD"):
            return r(4 * n) if self.like == "SGD with momentum" else 0
        return S + self._moments() * r(4 * n)  # the count of steps is on the device

    def held_state_bytes(self) -> int:
        """What of it is on the device throughout; scalars and tables always are."""
        adam = "Adam" in self.like and self.kind == "adam"
        staying = self.tables_bytes() + (S * len(self.shapes) if adam else 0)
        return staying if self.on_host else self.state_bytes()

    def resident_bytes(self) -> int:
        """There throughout."""
        return self.weights_bytes() + self.held_state_bytes()

    # The phase: what one micro-batch of n adds.

    def given_bytes(self, n: int) -> int:
        """Images, labels and seeds of a micro-batch, and the sum of the loss."""
        return r(4 * n * INPUTS) + 2 * r(8 * n) + S

    def activations_bytes(self, n: int) -> int:
        """Alive as the backward begins: what was given, the ReLU's and the network's results, the loss three times."""
        return self.given_bytes(n) + r(4 * n * HIDDEN) + r(4 * n * OUTPUTS) + 3 * S

    def phase_bytes(self, n: int, count: int) -> int:
        """The peak of a phase of `count` micro-batches beside what is there throughout."""
        return max(self._micro_batch(n, later) for later in (False, True)[: min(2, count)])

    def _micro_batch(self, n: int, later: bool) -> int:
        given, hidden, out = self.given_bytes(n), r(4 * n * HIDDEN), r(4 * n * OUTPUTS)
        first, second = ([r(4 * elements(shape)) for shape in layer] for layer in self.layers)
        after = self.update == "after"
        held = 0  # from the micro-batch before: gradients, or their norms
        if later:
            held = self.weights_bytes() if after else S * len(self.shapes)
        # Of the second layer, while the first is at work.
        gone = later or not after
        kept = 0 if gone else sum(second)
        norms = S * len(second) if not after and not later else 0
        scalars = 4 * S  # the loss, twice weighted, and its gradient
        moments = [
            given + 2 * hidden,  # ReLU: its operand and its result
            given + hidden + 2 * out,  # the square
            given + hidden + scalars + 5 * out,  # its derivative: what came out, and four factors and products
            given + 2 * hidden + scalars + out + sum(second),  # the second layer's gradients, and its input's
            given + 3 * hidden + scalars + kept + norms,  # the ReLU's
            given + hidden + scalars + kept + norms + sum(first),  # the first layer's
        ]
        moments += self._arrivals(given + 2 * hidden + scalars, second, 2, later)
        moments += self._arrivals(given + scalars + norms, first, 0, later) if gone else []
        return held + max(moments)

    def _arrivals(self, beside: int, layer: list[int], place: int, later: bool) -> Iterator[int]:
        """Each gradient of a layer as it is taken, the bias's first; those taken are gone but for their norm."""
        if self.update == "after":
            return
        norms, left = 0, sum(layer)
        for index in reversed(range(len(layer))):
            extra = 0
            if self.update == "deferred" and later:  # what the host held, and the sum with it
                extra = 2 * layer[index]
            elif self.update == "fused":
                extra = self.step_bytes(self.layers[place // 2][index])
            yield beside + norms + left + extra
            left -= layer[index]
            norms += 0 if later else S

    def step_bytes(self, shape: tuple[int, ...]) -> int:
        """What one parameter's step inside the backward needs beside its gradient: its norm, and temporaries."""
        weight, state = r(4 * elements(shape)), self._state_of(shape)
        if self.kind.endswith("8bit"):
            return S + self.chunk_bytes([shape])
        if self.kind == "adafactor":
            return S + weight + state + weight + self._factors(shape)
        return S + (weight + state if self.like.startswith("SGD") else 0)

    # The update.

    def update_bytes(self) -> int:
        """The peak of the update beside what is there throughout."""
        gradients = self.weights_bytes() if self.update == "after" else 0
        count = len(self.shapes)
        norms = S * (count + 3 if self.update == "after" else 4)  # and the loss, them together, and theirs
        return gradients + max(norms if self.update == "after" else 0, self._apply_bytes())

    def _apply_bytes(self) -> int:
        """The loss, gradients and state that come from the host, copies of what may be left half changed, and more."""
        loss = S
        if self.update == "fused":
            return loss
        brought = self.weights_bytes() if self.update == "deferred" else 0
        brought += self.state_bytes() - self.held_state_bytes()
        if self.kind.endswith("8bit"):
            return loss + brought + self.chunk_bytes(self.shapes)
        if self.kind == "adafactor":
            copies = self.weights_bytes() + self.state_bytes()
            sides = max(self._factors(shape) for shape in self.shapes)
            return loss + brought + copies + r(4 * max(map(elements, self.shapes))) + sides
        if self.like.startswith("SGD"):
            return loss + brought + self.weights_bytes() + self.state_bytes()
        return loss + brought  # torch's fused kernel needs nothing

    @staticmethod
    def _factors(shape: tuple[int, ...]) -> int:
        """A scalar, the norms of columns, and the norms of rows or two scalars more; of a vector three scalars."""
        return S + r(4 * shape[1]) + max(r(4 * shape[0]), 2 * S) if len(shape) == 2 else 3 * S

    def peak_bytes(self, n: int, count: int) -> int:
        """Of the step."""
        return self.resident_bytes() + max(self.phase_bytes(n, count), self.update_bytes())


def elements(shape: tuple[int, ...]) -> int:
    """Of a tensor."""
    return int(torch.Size(shape).numel())


# optimizer: (the task's own, memory.optimizer)
OPTIMIZERS = {
    "SGD": ("SGD", "adam"),
    "SGD with momentum": ("SGD with momentum", "adam"),
    "Adam": ("Adam", "adam"),
    "Adam without first moment": ("Adam without first moment", "adam"),
    "AdamW": ("AdamW", "adam"),
    "adam8bit": ("AdamW", "adam8bit"),
    "adam8bit without first moment": ("Adam without first moment", "adam8bit"),
    "adafactor": ("AdamW", "adafactor"),
    "lion8bit": ("AdamW", "lion8bit"),
}
UPDATES = [("after", "device"), ("deferred", "device"), ("fused", "device"), ("after", "host"), ("deferred", "host")]


def estimated(pieces: Pieces, own: OptimizerPolicy, micro: int) -> tuple[Estimator, MemoryPolicy]:
    """An estimator of the MLP, and the policy; micro-batches are recorded as they are."""
    policy = MemoryPolicy(phases={"fit": PhasePolicy(micro_batch=micro)}, optimizers={"fit": own})
    estimator = Estimator(pieces, Structure(), cards.find("RTX 3060"))
    return estimator, policy


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_what_the_hand_counts(name: str, bias: bool, batch: int) -> None:
    like, kind = OPTIMIZERS[name]
    with Pieces(mlp(LIKES[like], bias=bias, batch=batch), processes=1) as pieces:
        wrong = {}
        for update, state in UPDATES:
            for count in (1, 4) if update != "fused" else (1,):
                hand = Hand(bias=bias, like=like, kind=kind, update=update, on_host=state == "host")
                own = OptimizerPolicy(kind=kind, update=update, state=state)
                estimator, policy = estimated(pieces, own, batch // count)
                parts = highest(estimator.requests(policy))
                counted = by_hand(hand, batch // count, count)
                traced = {
                    "weights": parts["start"].by_category["weights"],
                    "state": parts["start"].by_category["optimizer"],
                    "phase": parts["fit"].live_bytes,
                }
                if traced != counted:
                    wrong[update, state, count] = {key: (traced[key], counted[key]) for key in counted}
        assert not wrong


def by_hand(hand: Hand, n: int, count: int) -> Mapping[str, int]:
    """Weights, state on the device, and the peak of the step."""
    return {"weights": hand.weights_bytes(), "state": hand.held_state_bytes(), "phase": hand.peak_bytes(n, count)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_activations_and_gradients_are_what_the_hand_counts(bias: bool) -> None:
    n = 256
    hand = Hand(bias=bias, like="Adam", kind="adam", update="after", on_host=False)
    with Pieces(mlp(LIKES["Adam"], bias=bias, batch=n), processes=1) as pieces:
        facts = pieces.facts(Structure())
        piece = pieces.get(Job(structure=Structure(), what="phase", name="fit", samples=n)).piece
    sizes = [r(int(size)) for size in piece.sizes]
    of = {kind: sum(s for s, k in zip(sizes, piece.categories, strict=True) if k == kind) for kind in range(6)}
    assert of[ACTIVATIONS] == hand.activations_bytes(n)
    assert of[GRADIENTS] == hand.weights_bytes()
    assert sum(r(size) for kind, size in facts.residents.sizes if kind == WEIGHTS) == hand.weights_bytes()
    assert facts.residents.total_bytes(OPTIMIZER) == 0  # it is the update's
    assert facts.parameter_bytes["fit"] == 4 * sum(map(elements, hand.shapes))
    # Forward, and backward to both weights and to the hidden layer: 2 flops a product, three times and two.
    products = n * (2 * INPUTS * HIDDEN + 3 * HIDDEN * OUTPUTS)
    assert float(piece.work.flops.sum()) == 2 * products


# The real allocator.

GAN = ("augment.mode=none", "batch=8", "model.num_fp16_res=0")  # a CPU computes in fp32
REAL: dict[str, tuple[Builder, str]] = {
    "StyleGAN2": (stylegan2(*GAN), "keep"),
    "StyleGAN2, augmented": (stylegan2("batch=8", "model.num_fp16_res=0"), "keep"),
    "StyleGAN2, recomputed": (stylegan2(*GAN), "recompute"),
    "UNet": (small_unet(8), "keep"),
    "UNet, recomputed": (small_unet(8), "recompute"),
    "ResNet": (classifier(resnet, 8), "keep"),
    "transformer": (classifier(Transformer, 8), "keep"),
}
SMALL_BYTES = 256  # numbers from Python, and seeds: on a card they are the host's
# The mean that torch's mse_loss returns, a single number, keeps the memory of all squares; its fake one does not.
MEAN_BYTES = {"UNet, recomputed": 4 * 8 * 3 * 16 * 16}
# Of a peak of a few MB: oneDNN's reordered weights, 0.15 with AVX-512, 0.5 with AVX2; on a card cuDNN's, planned apart.
WORKSPACE = 0.15 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 0.6


LONG = ("StyleGAN2", "StyleGAN2, augmented", "StyleGAN2, recomputed", "UNet, recomputed")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in REAL])
def test_the_allocator_gives_what_was_traced(name: str) -> None:
    """All that outlives a kernel is in the trace, to the byte; workspaces within kernels are beside it, and few."""
    build, activations = REAL[name]
    with as_on_a_cpu():
        measured, traced = _measured(build, activations), _traced(build, activations)
    assert measured.keys() == traced.keys()
    for phase, (real, update) in measured.items():
        piece_bytes, update_bytes = traced[phase]
        assert 0 <= real.outliving_bytes - piece_bytes <= SMALL_BYTES + MEAN_BYTES.get(name, 0), phase
        assert piece_bytes <= real.all_bytes <= piece_bytes * (1 + WORKSPACE), phase
        assert abs(update.all_bytes - update_bytes) <= SMALL_BYTES, phase


def _measured(build: Builder, activations: str) -> dict[str, tuple[Peaks, Peaks]]:
    """By phase: its forward and backward, and its update, of a real training."""
    made = build()
    own = {p.name: PhasePolicy(activations=_kind(activations, p.second_order)) for p in made.phases}
    applied = Applied(
        MemoryPolicy(phases=own),
        made.phases,
        device=torch.device("cpu"),
        averages=made.averages,
        own_precision=made.own_precision,
        zero_nonfinite=made.zero_nonfinite,
    )
    found = {}
    for phase in made.phases:

        def gradients(phase: Phase = phase) -> Tensor:
            with applied.running(phase):
                return applied.accumulate(phase, iter([made.micro_batch(phase, phase.samples)]))[0]

        real = peaks_of(gradients)
        found[phase.name] = real, peaks_of(lambda phase=phase: applied.update(phase, torch.zeros([])))
    return found


def _traced(build: Builder, activations: str) -> dict[str, tuple[int, int]]:
    with Pieces(build, processes=1) as pieces:
        structure, found = Structure(), {}
        for phase in pieces.facts(structure).phases:
            kind = _kind(activations, phase.second_order)
            job = Job(
                structure=structure,
                what="phase",
                name=phase.name,
                samples=phase.samples_per_process,
                activations=kind,
            )
            update = Job(structure=structure, what="update", name=phase.optimizer)
            found[phase.name] = unrounded_peak(pieces.get(job).piece), unrounded_peak(pieces.get(update).piece)
    return found


def _kind(activations: str, second_order: bool) -> str:
    return "keep" if second_order else activations
