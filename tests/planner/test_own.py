"""A plan for networks of others' libraries, none changed for it: it leaves no trace, fits, is exact and carried out."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram import LowVRAMError, MicroBatch, Phase, plan_memory
from lowvram.ema import ExponentialMovingAverage
from lowvram.memory.tracer import LiveBytes
from lowvram.planner import pieces
from lowvram.planner.plan import PhasePlan, Plan

STEPS = 3


@dataclass(kw_only=True)
class Case:
    """A network, how it is trained, and a budget between what it wants and what it can do with."""

    network: nn.Module
    batch: Any
    samples: int
    loss: Callable[[nn.Module, MicroBatch], Tensor]
    vram: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]

    def phase(self, network: nn.Module, **options: Any) -> Phase:
        return Phase(
            name="train",
            networks=(network,),
            optimizer=self.optimizer(network),
            loss=lambda micro: self.loss(network, micro),
            samples=self.samples,
            **options,
        )

    def plan(self, phase: Phase, **options: Any) -> Plan:
        return plan_memory([phase], example=self.batch, **{"vram": self.vram, "precision": "fp32", **options})


def classified(network: nn.Module, micro: MicroBatch) -> Tensor:
    return F.cross_entropy(network(micro.images), micro.labels)


def of_torchvision() -> Case:
    """A convolutional network with batch normalisation, by SGD with momentum."""
    return Case(
        network=torchvision.models.MobileNetV2(
            num_classes=10, width_mult=0.5, dropout=0.0, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 3, 2]]
        ),
        batch=(torch.randn(16, 3, 128, 128), torch.arange(16) % 10),
        samples=16,
        loss=classified,
        vram="0.97GB",
        optimizer=lambda network: torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
    )


def of_timm() -> Case:
    """A transformer for images, by AdamW with a bound on the gradient."""
    network = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=160, num_classes=10)
    return Case(
        network=network,
        batch=(torch.randn(32, 3, 160, 160), torch.arange(32) % 10),
        samples=32,
        loss=classified,
        vram="768MB",
        optimizer=lambda network: torch.optim.AdamW(network.parameters(), lr=1e-3),
    )


def of_transformers() -> Case:
    """A language model with its own loss, by Adam; the batch is a dict, the embedding is shared with the output."""
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=2, vocab_size=20000, n_positions=96, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(0, 20000, (16, 96))
    return Case(
        network=transformers.GPT2LMHeadModel(config),
        batch={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
        samples=16,
        loss=lambda network, micro: network(**micro.inputs).loss,
        vram="0.9GB",
        optimizer=lambda network: torch.optim.Adam(network.parameters(), lr=1e-3),
    )


MAKERS = {"torchvision": of_torchvision, "timm": of_timm, "transformers": of_transformers}


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def plan(case: Case) -> Plan:
    return case.plan(case.phase(case.network))


def row(plan: Plan) -> PhasePlan:
    return plan.phases[0]


def plain_losses(case: Case) -> list[float]:
    """Of the usual loop, over the whole batch."""
    network = copy.deepcopy(case.network)
    optimizer = case.optimizer(network)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = case.loss(network, MicroBatch.of(case.batch, torch.arange(case.samples)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_plan_fits_and_trains_to_the_losses_of_the_plain_loop_in_the_memory_it_foretold(
    case: Case, plan: Plan
) -> None:
    assert plan.fits
    assert plan.settings, "the budget should have forced something"
    network = copy.deepcopy(case.network)
    phase = case.phase(network)
    applied = plan.apply([phase])
    losses = []
    with LiveBytes() as memory:
        memory.watch(network)
        for step in range(STEPS):
            outcome = applied.step(phase, case.batch)
            assert outcome is not None and outcome.applied
            losses.append(outcome.loss)
            if step == 0:
                for updater in applied.updaters.values():
                    memory.watch(*(part.optimizer for b in updater.buckets.values() for part in b.parts))
                memory.reset_peak()
    np.testing.assert_allclose(losses, plain_losses(case), rtol=1e-4)
    assert losses[-1] < losses[0]
    assert memory.peak_bytes == pytest.approx(row(plan).live_bytes, rel=0.01)


# What planning leaves as it was, and what it does not bear. On a small network.


class Odd(nn.Module):
    """Everything that could keep a trace of planning: caches, lists of parameters, buffers that a forward replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
        self.inner[3].weight = self.inner[0].weight  # shared
        self.frozen = nn.Linear(8, 8).requires_grad_(False).eval()
        self.lstm = nn.LSTM(8, 8, batch_first=True)  # keeps its parameters in a list, too
        self.normed = nn.utils.spectral_norm(nn.Linear(8, 8))  # sets an attribute in its forward
        self.cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.cache["x"] = self.last = x
        x = self.frozen(self.inner(x))
        return self.normed(self.lstm(x[:, None])[0][:, 0])


def everything(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Objects and values, deep enough to tell that nothing was touched."""
    found: dict[str, Any] = {}
    for name, module in network.named_modules():
        found[f"{name} training"] = module.training
        for key, value in vars(module).items():
            found[f"{name} {key}"] = value
            if isinstance(value, dict):
                found |= {f"{name} {key} {k}": v for k, v in value.items()}
            elif isinstance(value, list):
                found |= {f"{name} {key} {k}": v for k, v in enumerate(value)}
    for n, group in enumerate(optimizer.param_groups):
        found |= {f"group {n} {k}": p for k, p in enumerate(group["params"])}
    return found


def values(network: nn.Module) -> dict[str, Any]:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    grads = {f"{name}.grad": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    flags = {f"{name} asks": torch.tensor(p.requires_grad) for name, p in network.named_parameters()}
    return {**copies, **grads, **flags}


def small_phase(network: nn.Module, loss: Callable[[MicroBatch], Any] | None = None, **options: Any) -> Phase:
    trained = options.pop("networks", (network,))
    params = dict.fromkeys(p for one in trained for p in one.parameters())
    given: dict[str, Any] = {"name": "fit", "samples": 4, **options}
    loss = loss or (lambda micro: network(micro.images).square().mean())
    return Phase(networks=trained, optimizer=torch.optim.AdamW(params, lr=1e-2), loss=loss, **given)


def small_plan(*phases: Phase, **options: Any) -> Plan:
    return plan_memory(list(phases), **{"vram": "6GB", "example": torch.zeros(4, 8), "precision": "fp32", **options})


@pytest.fixture(params=["beside", "within"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Recordings made in other processes, and in this one."""
    monkeypatch.setattr(pieces, "_safe_processes", lambda: 2 if request.param == "beside" else 1)
    yield request.param


def random_state() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002 - the global one is what users may use
    return random.getstate(), numpy[1].tolist(), torch.get_rng_state().tolist()


def trained_a_little(network: Odd) -> tuple[Phase, torch.optim.Optimizer]:
    phase = small_phase(
        network,
        loss=lambda micro: (network(micro.images) * random.random() + torch.randn(4, 8)).square().mean(),
        networks=(network.inner, network.lstm, network.normed),
    )
    network(torch.randn(4, 8)).square().mean().backward()
    phase.optimizer.step()
    return phase, phase.optimizer


def test_planning_changes_nothing(processes: str) -> None:
    network = Odd()
    phase, optimizer = trained_a_little(network)
    objects, before, state = everything(network, optimizer), values(network), copy.deepcopy(optimizer.state_dict())
    drawn = random_state()
    assert small_plan(phase, networks={"odd": network}).fits
    after = everything(network, optimizer)
    assert after.keys() == objects.keys()
    assert all(after[name] is objects[name] for name in objects)
    torch.testing.assert_close(values(network), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert random_state() == drawn
    assert phase.micro_batch is None


def test_a_failed_plan_changes_nothing_either(processes: str) -> None:
    network = Odd()
    phase, optimizer = trained_a_little(network)
    phase.loss = lambda micro: network(micro.images).square().mean() + 1 / 0
    objects, before = everything(network, optimizer), values(network)
    with pytest.raises(LowVRAMError, match=r"phase fit: its loss failed .* ZeroDivisionError"):
        small_plan(phase, networks={"odd": network})
    after = everything(network, optimizer)
    assert after.keys() == objects.keys() and all(after[name] is objects[name] for name in objects)
    torch.testing.assert_close(values(network), before, rtol=0, atol=0)


def test_parameters_that_nobody_made_yet_can_be_planned_for() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(8, 4000), nn.ReLU(), nn.Linear(4000, 8))
    plan = small_plan(small_phase(network))
    assert row(plan).by_category["weights"] >= 4 * 2 * 8 * 4000


def test_what_a_loss_reads_is_zero(processes: str) -> None:
    network = nn.Linear(8, 8)

    def loss(micro: MicroBatch) -> Tensor:
        value = network(micro.images).square().mean()
        return value if value.item() > 1 or bool((micro.images > 0).any()) else 2 * value

    assert small_plan(small_phase(network, loss)).fits


WRONG: dict[str, tuple[Callable[[nn.Module, MicroBatch], Any], str]] = {
    "shape by value": (lambda n, m: n(m.images[m.images.sum(1).nonzero()[:, 0]]).mean(), "depends on values"),
    "mask": (lambda n, m: n(m.images)[m.images > 0].mean(), "depends on values"),
    "no mean": (lambda n, m: n(m.images).square(), r"shape \[4, 8\]"),
    "no tensor": (lambda n, m: 3.0, "a float"),
    "no graph": (lambda n, m: n(m.images).detach().mean(), "does not depend on a parameter"),
    "failing": (lambda n, m: n(m.images[:, :3]).mean(), "failed on 4 samples"),
    "unknown network": (lambda n, m: UNKNOWN(n(m.images)).mean(), "runs a Linear that planning"),
    "loose parameter": (lambda n, m: (n(m.images) * LOOSE).mean(), r"parameter of shape \[8\]"),
}
LOOSE, UNKNOWN = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)


@pytest.mark.parametrize("what", WRONG)
def test_losses_that_cannot_be_planned_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_safe_processes", lambda: 1)
    network = nn.Linear(8, 8)
    loss, said = WRONG[what]
    phase = small_phase(network, lambda micro: loss(network, micro))
    with pytest.raises(LowVRAMError, match=said) as raised:
        small_plan(phase)
    assert "phase fit" in raised.value.problem and raised.value.remedy
    assert LOOSE.grad is None and all(type(p) is nn.Parameter for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vram": "6"}, "vram=6 has no unit"),
        ({"vram": "-1GB"}, "vram=-1GB"),
        ({"vram": "900GB"}, "more than any card has"),
        ({"vram": "100MB"}, "leaves nothing to train with"),
        ({"card": "3061"}, "3061"),
        ({"card": "2060", "precision": "bf16"}, "no bf16"),
        ({"precision": "fp8"}, "precision=fp8"),
        ({"allow": ["fd_r1"]}, "allow=fd_r1"),
        ({"allow": ["adam8"]}, "allow=adam8"),
        ({"example": ["a", "b"]}, "is a str"),
        ({"example": torch.tensor(3.0)}, "holds no samples"),
        ({"example": {}}, "no tensor"),
        ({"example": (torch.zeros(4, 8), torch.zeros(3))}, r"batch\[1\] has 3 samples"),
    ],
)
def test_nonsense_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LowVRAMError, match=re.compile(said)):
        small_plan(small_phase(nn.Linear(8, 8)), **options)


def test_phases_that_make_no_sense() -> None:
    network = nn.Linear(8, 8)
    with pytest.raises(LowVRAMError, match="no phase"):
        small_plan()
    with pytest.raises(LowVRAMError, match="two phases are called fit"):
        small_plan(small_phase(network), small_phase(network))
    with pytest.raises(LowVRAMError, match="in groups of 3"):
        small_plan(small_phase(network, group=3))
    half = small_phase(network)
    half.optimizer = torch.optim.AdamW([network.weight])
    with pytest.raises(LowVRAMError, match="1 parameters of its networks are not in its optimizer"):
        small_plan(half)


def test_frozen_networks_and_averages_are_counted() -> None:
    network, big = nn.Linear(8, 8), nn.Linear(8, 2**17).requires_grad_(False)
    loss = lambda micro: big(network(micro.images)).square().mean()  # noqa: E731
    alone = small_plan(small_phase(network))
    with_big = small_plan(small_phase(network, loss), networks={"big": big})
    assert row(with_big).by_category["weights"] - row(alone).by_category["weights"] >= 4 * 9 * 2**17
    average = ExponentialMovingAverage(network, copy.deepcopy(network), half_life_kimg=1, rampup=None)
    averaged = small_plan(small_phase(network), averages=[average])
    assert row(averaged).by_category["average"] and not row(alone).by_category["average"]
    assert [phase.name for phase in averaged.phases] == ["fit", "average", "saving"]


def test_state_that_an_optimizer_makes_in_its_first_step_is_counted() -> None:
    network = nn.Linear(8, 2**16)
    phase = small_phase(network)
    phase.optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    assert row(small_plan(phase)).by_category["optimizer"] >= 4 * 9 * 2**16


def test_batches_stay_whole_for_batch_normalisation_unless_allowed() -> None:
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())]
    phase = small_phase(nn.Sequential(*layers), samples=16)
    example = torch.empty(16, 8, 512, 512, device="meta")  # 128 MB
    plan = small_plan(phase, vram="1GB", example=example)
    assert not plan.fits and any("allow=batch_norm" in need for need in plan.needs)
    with pytest.raises(LowVRAMError, match="does not fit"):
        plan.apply([phase])
    cut = small_plan(phase, vram="1GB", example=example, allow=["batch_norm"])
    assert cut.fits and row(cut).micro_batch < 16 and "batch normalisation" in cut.changes[0]
    phase.networks[0].eval()
    assert small_plan(phase, vram="1GB", example=example).fits


def test_a_plan_is_for_its_own_phases() -> None:
    network = nn.Linear(8, 8)
    plan = small_plan(small_phase(network))
    with pytest.raises(LowVRAMError, match="fit 4 samples, and these are fit 2"):
        plan.apply([small_phase(network, samples=2)])
    again = Plan.from_json(plan.to_json())
    phase = small_phase(network, every=2)
    applied = again.apply([phase])
    batch = torch.randn(4, 8)
    assert applied.step(phase, batch) is not None
    assert applied.step(phase, batch) is None  # every second step
    with pytest.raises(LowVRAMError, match="a batch of 3 samples"):
        applied.step(phase, batch[:3])


def test_the_optimizers_state_and_learning_rate_are_taken_over() -> None:
    torch.manual_seed(0)
    network, batch = nn.Linear(8, 8), torch.randn(4, 8)
    phase = small_phase(network)
    plain = copy.deepcopy(network)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for one, optimizer in ((network, phase.optimizer), (plain, reference)):
        for _ in range(2):
            optimizer.zero_grad()
            one(batch).square().mean().backward()
            optimizer.step()
    applied = small_plan(phase).apply([phase])
    phase.optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 1e-3
    applied.step(phase, batch)
    reference.zero_grad()
    plain(batch).square().mean().backward()
    reference.step()
    torch.testing.assert_close(network.weight, plain.weight)


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    network = nn.Linear(8, 8)
    phase = small_phase(network)
    applied = small_plan(phase).apply([phase])
    before = network.weight.detach().clone()
    with pytest.raises(LowVRAMError, match="phase fit: at step 0 the loss is nan"):
        applied.step(phase, torch.full((4, 8), float("nan")))
    assert torch.equal(network.weight, before)


def test_two_phases_and_their_draws_by_sample() -> None:
    """Noise drawn from `micro.seeds` is the same however the batch is cut."""
    from lowvram import seeded

    seen: dict[int, list[Tensor]] = {}
    for micro_batch in (4, 1):
        network, drawn = nn.Linear(8, 8), seen.setdefault(micro_batch, [])

        def loss(micro: MicroBatch, network: nn.Module = network, drawn: list[Tensor] = drawn) -> Tensor:
            noise = seeded.randn(micro.seeds, 8, stream="noise")
            drawn.append(noise)
            return network(micro.images + noise).square().mean()

        phases = [small_phase(network, loss, name=name) for name in ("first", "second")]
        phases[1].optimizer = phases[0].optimizer
        plan = small_plan(*phases)
        drawn.clear()
        applied = plan.apply(phases)
        for phase in applied.phases:
            phase.micro_batch = micro_batch
            applied.step(phase, torch.zeros(4, 8), number=5)
    assert torch.equal(torch.cat(seen[4]), torch.cat(seen[1]))
