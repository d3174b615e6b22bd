"""Carry out a `MemoryPolicy` on plain networks, from outside and in one fixed order.

    applied = apply(policy, phases, device=device)
    with applied.running(phase):
        loss, means = applied.accumulate(phase, micro_batches)
    outcome = applied.update(phase, loss)

The order: weights' dtype, their place (sharded, streamed or resident), frozen weights' place, optimizers and gradient
hooks, the averages' place; then, each time a phase runs: trainable weights, attention, blocks (streamed, recomputed),
autocast, offloaded activations.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowvram.ema import ExponentialMovingAverage, on_device
from lowvram.errors import LowVRAMError
from lowvram.memory import attention, checkpointing, fsdp, precision
from lowvram.memory.blocks import blocks_of
from lowvram.memory.check import check
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.offload import ActivationOffload
from lowvram.memory.policy import MemoryPolicy, OptimizerPolicy
from lowvram.memory.recovery import free_memory
from lowvram.memory.stream import BlockStream
from lowvram.memory.update import Outcome, Updater
from lowvram.phase import MicroBatch, Phase

if TYPE_CHECKING:
    from lowvram.memory.rescue import Rescue

log = logging.getLogger(__name__)


def apply(policy: MemoryPolicy, phases: Sequence[Phase], *, device: torch.device | str, **options: object) -> "Applied":
    """Wrap the networks and optimizers of `phases`. Their state-dict keys stay as they are. Options: see `Applied`."""
    return Applied(policy, phases, device=torch.device(device), **options)  # type: ignore[arg-type]


class Applied:
    """Phases under a policy.

    Args:
        policy: what to do. Changed later by `change`, after a step that ran out of memory.
        phases: of plain networks and plain optimizers; a phase's own optimizer only lends its hyperparameters. Networks
            may be anywhere: they are moved tensor by tensor to where the policy wants them.
        averages: averaged networks, moved where the policy wants them.
        blocks: a network's blocks by name, for networks whose structure does not show them.
        seed: root of the random numbers of stochastic rounding.
        own_precision: the networks choose their 16-bit layers themselves, so that neither autocast nor narrow weights
            are for them; non-finite elements of their gradients are zeroed if `zero_nonfinite`.
        world_size, sum_over_processes: of data-parallel training.

    Raises:
        LowVRAMError: the policy can't be honoured; the settings that stand against each other are named.
    """

    def __init__(
        self,
        policy: MemoryPolicy,
        phases: Sequence[Phase],
        *,
        device: torch.device,
        averages: Sequence[ExponentialMovingAverage] = (),
        blocks: Mapping[nn.Module, Mapping[str, nn.Module]] | None = None,
        seed: int = 0,
        own_precision: bool = False,
        zero_nonfinite: bool = False,
        world_size: int = 1,
        sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.policy, self.phases, self.device, self.averages = policy, list(phases), device, list(averages)
        self.seed, self.world_size, self._zero_nonfinite = seed, world_size, zero_nonfinite
        self._sum = sum_over_processes if world_size > 1 else None
        self._steps: dict[str, int] = {}  # calls of `step`, by the name of the phase
        self._rescue: Rescue | None = None
        self.optimizer_names: dict[str, str] = {}  # by the name of the phase
        names: dict[int, str] = {}
        for phase in self.phases:
            self.optimizer_names[phase.name] = names.setdefault(id(phase.optimizer), phase.name)
        self._networks: dict[int, nn.Module] = {id(n): n for phase in self.phases for n in phase.networks}
        self._frozen: dict[int, nn.Module] = {
            id(n): n for phase in self.phases for n in phase.frozen if id(n) not in self._networks
        }
        self._blocks = self._find_all(blocks)
        check(policy, self.phases, self.optimizer_names, self._facts_by_name(), own_precision, world_size, device)

        self._streams: dict[int, BlockStream] = {}
        self._sharded: list[nn.Module] = []
        self.updaters: dict[str, Updater] = {}
        self._place_weights()
        for name in dict.fromkeys(self.optimizer_names.values()):
            self.updaters[name] = self._make_updater(name)
        self._place_averages()
        # Weights stay where they are; autograd does not tell which of the saved tensors are some.
        weights = [*(p for network in self.networks for p in network.parameters()), *self.packed()]
        self._offload = ActivationOffload(device, skip=weights)
        self._set_micro_batches()

    @property
    def networks(self) -> list[nn.Module]:
        """Those that phases train, and those that they leave as they are."""
        return [*self._networks.values(), *self._frozen.values()]

    # A phase.

    @contextmanager
    def running(self, phase: Phase, *, collect: bool = True) -> Iterator[None]:
        """What a phase's forward and backward need around them. collect: their gradients are for an update."""
        own = self.policy.phase(phase.name)
        with ExitStack() as stack:
            stack.enter_context(phase.trainable())
            if collect:
                stack.enter_context(self.updater(phase).collecting())
            stack.enter_context(attention.using(self.policy.attention, second_order=phase.second_order))
            for stream in self._streams.values():
                # Under a second derivative recomputed blocks would be kept all the same: they stay for the phase.
                stack.enter_context(stream.resident() if phase.second_order else stream.running())
            if own.activations == "recompute":
                for key, blocks in self._blocks.items():
                    own_stream = self._streams.get(key)  # whose blocks are recomputed anyway, but for those that stay
                    here = [b for name, b in blocks.items() if own_stream is None or name in own_stream.staying]
                    stack.enter_context(checkpointing.recomputing(here, own.recompute_every))
            if self._sharded:
                stack.enter_context(fsdp.running(self._sharded, second_order=phase.second_order))
            yield

    def losses(self, phase: Phase, micro: MicroBatch) -> Iterator[Tensor]:
        """The terms of a phase's loss under autocast, their activations offloaded if so wished. Within `running`."""
        terms = phase.losses(micro)
        while True:
            with ExitStack() as stack:
                stack.enter_context(precision.autocast(self.policy.precision, self.device))
                if self.policy.phase(phase.name).activations == "offload":
                    stack.enter_context(self._offload)
                loss = next(terms, None)
            if loss is None:
                return
            yield loss
            del loss  # before the next is made

    def accumulate(self, phase: Phase, micro_batches: Iterator[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of a phase, within `running`; its loss and what it reported, as means over all processes."""
        updater = self.updater(phase)
        total = torch.zeros([], device=self.device)
        reported: dict[str, Tensor] = {}
        for micro in micro_batches:
            for loss in self.losses(phase, micro):
                weighted = loss.float() * (len(micro) / phase.samples)
                updater.backward(weighted * phase.every)
                total += weighted.detach()
                del loss, weighted  # their graph holds the activations
            for name, value in micro.reported.items():
                reported[name] = reported[name] + value if name in reported else value
        means = {name: self._summed(value) / phase.samples for name, value in sorted(reported.items())}
        return self._summed(total), means

    def update(self, phase: Phase, loss: Tensor) -> Outcome:
        """Apply the accumulated gradients if all is finite. Interrupted, it can be called again."""
        return self.updater(phase).finish(loss, phase.clip_norm)

    def step(self, phase: Phase, batch: Any, *, number: int | None = None) -> Outcome | None:
        """A whole update of a phase in a single process; None at steps that `every` leaves out.

        The batch is cut, its parts go to the device one by one, and `finish` gets the means. The learning rate is that
        of the phase's own optimizer now, so that schedulers work. Out of memory, the phase is done again under the next
        thriftier policy.

        batch: as `Phase.cut` takes it, n >= phase.samples. number: of the step; by itself, counted from 0.

        Raises:
            LowVRAMError: the batch can't be cut so, the loss or its gradients are not finite, or no policy is left.
        """
        number = self._steps.get(phase.name, 0) if number is None else number
        self._steps[phase.name] = number + 1
        if number % phase.every:
            return None
        if self._rescue is None:
            from lowvram.memory.rescue import Rescue  # which needs this file

            self._rescue = Rescue(self, self.networks, log.warning)

        def gradients() -> tuple[Tensor, dict[str, Tensor]]:
            with self.running(phase):
                return self.accumulate(phase, phase.cut(batch, number=number, seed=self.seed, device=self.device))

        loss, means = self._rescue.redo(phase, gradients)
        outcome: Outcome = self._rescue.resume(phase, lambda: self.update(phase, loss))
        if not outcome.finite:
            raise LowVRAMError(
                f"phase {phase.name}: at step {number} the loss is {outcome.loss}, its gradient's norm {outcome.norm}.",
                "The step was not applied. Lower the learning rate, bound clip_norm, or plan with precision=fp32.",
            )
        if outcome.applied and phase.finish is not None:
            phase.finish(means)
        return outcome

    def discard(self, phase: Phase) -> None:
        """Forget the gradients of a phase that was interrupted, to run it again.

        Raises:
            LowVRAMError: update=fused had applied some of them.
        """
        for network in self._sharded:
            fsdp.reset(network)
        self.updater(phase).discard()

    def updater(self, phase: Phase) -> Updater:
        """What changes a phase's weights."""
        return self.updaters[self.optimizer_names[phase.name]]

    # Between phases.

    def settle(self) -> None:
        """Make the networks' parameters current where updates wait for a block's next use."""
        for updater in self.updaters.values():
            updater.flush()

    def flush(self) -> None:
        """As `settle`, and frozen networks that stream are on the host too, whole."""
        self.settle()
        for stream in self._streams.values():
            stream.flush()

    def change(self, policy: MemoryPolicy) -> None:
        """Go on under another policy, whose micro-batches, activations, updates and places of state may differ."""
        moved = policy.resident != self.policy.resident
        changed = [
            name
            for name in self.updaters
            if policy.optimizer(name) != self.policy.optimizer(name)
            or (moved and policy.optimizer(name).weights == "stream")
        ]
        for name in changed:
            was = self.policy.optimizer(name)
            if replace(policy.optimizer(name), state=was.state, update=was.update) != was:
                raise LowVRAMError(
                    f"of the optimizer {name} a running training can change the update and the state's place only.",
                    "Stop, and resume with the other settings.",
                )
        if policy.frozen != self.policy.frozen and policy.frozen != "stream":
            raise LowVRAMError(
                "frozen weights that are streamed stay so in a running training.",
                "Stop, and resume with memory.frozen=device.",
            )
        if moved and policy.resident:
            raise LowVRAMError(
                f"memory.resident of a running training can become 0 only, not {policy.resident:g}.",
                f"Stop, and resume with memory.resident={policy.resident:g}.",
            )
        if moved:
            self.settle()
        self.policy = policy
        for stream in self._streams.values() if moved else ():
            stream.stream_all()
        self._place_frozen()
        for name in changed:
            tensors, numbers = self._taken_apart(name)
            free_memory(self.device)  # the old state's, before the new one's is made
            self.updaters[name] = self._make_updater(name)
            self.updaters[name].load_state(tensors, numbers)
        self._place_averages()
        self._set_micro_batches()

    def _taken_apart(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An updater's state on the host; the updater is gone, and with it what it held on the device."""
        updater = self.updaters.pop(name)
        tensors, numbers = updater.state()
        updater.close()
        return {key: tensor.cpu() for key, tensor in tensors.items()}, numbers

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within, networks can be called to sample from: the averaged ones, the trained ones and the frozen ones.

        Nothing is recomputed. What streams is called by its streams; averages that live on the host come to the device,
        whole, or block by block where the policy streams weights, which then do not fit as a whole. The host holds
        nothing twice.
        """
        with ExitStack() as stack:
            for stream in self._streams.values():
                stack.enter_context(stream.running())
            for average in self.averages:
                if self.policy.ema == "host" and self._streams:
                    stack.enter_context(self._by_blocks(average.target))
                else:
                    stack.enter_context(on_device(average.target, self.device))
            yield

    @contextmanager
    def _by_blocks(self, network: nn.Module) -> Iterator[None]:
        """A network on the host can be called within: each of its blocks is on the device while it runs."""
        blocks = list(blocks_of(network).values())

        def wrap(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def brought(*args: Any, **kwargs: Any) -> Any:
                with on_device(block, self.device):
                    return forward(*args, **kwargs)

            return brought

        inside = {module for block in blocks for module in block.modules()}
        with on_device(network, self.device, leave=inside), checkpointing.wrapped_forwards(blocks, wrap):
            yield

    def full_state(self, network: nn.Module) -> dict[str, Tensor]:
        """A network's state dict as if nothing were done to it. Every process calls it."""
        for key in self._frozen.keys() & self._streams.keys():  # a copy on the device would be overwritten
            self._streams[key].flush()
        return fsdp.full_state(network) if fsdp.is_sharded(network) else network.state_dict()

    def load_state(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load what `full_state` gave, under this policy or any other."""
        self.settle()
        if fsdp.is_sharded(network):
            fsdp.load_full(network, tensors)
        else:
            network.load_state_dict(dict(tensors))

    def packed(self) -> list[Tensor]:
        """Frozen weights that are no parameters: buffers of bytes, in which values of 4 or 8 bits are packed."""
        return [b for network in self._frozen.values() for b in network.buffers() if b.dtype == torch.uint8]

    def facts(self, phase: Phase) -> PhaseFacts:
        """What the choice of a thriftier policy needs to know of a phase."""
        return PhaseFacts(
            name=phase.name,
            optimizer=self.optimizer_names[phase.name],
            samples_per_process=-(-phase.samples // self.world_size),
            group=phase.group,
            second_order=phase.second_order,
            has_blocks=any(self._blocks.values()),
            trained_blocks=any(self._blocks[key] for key in self._networks),
            frozen_blocks=any(self._blocks[id(n)] for n in phase.frozen if id(n) in self._frozen),
        )

    # For planning.

    def another_updater(self, name: str, policy: OptimizerPolicy) -> Updater:
        """What would change the weights of an optimizer under another policy, with a new state."""
        return self._make_updater(name, policy)

    def largest_block_bytes(self) -> int:
        """The weights of the largest block; of the largest parameter where networks show none."""
        blocks = [block for found in self._blocks.values() for block in found.values()]
        sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
        params = [p.numel() * p.element_size() for n in self.networks for p in n.parameters()]
        return max(sizes or params, default=0)

    def slot_sizes_bytes(self) -> list[int]:
        """What streams hold on the device between uses of their blocks."""
        return [size for stream in self._streams.values() for size in stream.slot_sizes_bytes()]

    def streamed_bytes(self) -> list[tuple[str | None, list[list[int]]]]:
        """Of each network that streams: its optimizer (None: it is frozen), and its parameters' bytes block by block.

        Those of blocks that stay on the device are not among them.
        """
        names = {id(network): name for name, network in self._named_networks()}
        return [
            (names.get(key), [[param.nbytes for param in params] for params in stream.params.values()])
            for key, stream in self._streams.items()
        ]

    def copied_bytes(self) -> int:
        """The weights that streams have copied so far, to the device and back."""
        return sum(stream.copied_bytes for stream in self._streams.values())

    def frozen_bytes(self) -> int:
        """The weights of frozen networks that streams keep on the host, or would keep there."""
        blocks = [block for key in self._frozen for block in self._blocks[key].values()]
        return sum(p.nbytes for p in {p for b in blocks for p in b.parameters()} - self._changing())

    def make_slots(self) -> None:
        """Have the device memory of all streams, as it is once their blocks have run."""
        for stream in self._streams.values():
            stream.make_slots()

    # Construction.

    def _place_weights(self) -> None:
        for name, network in self._named_networks():
            policy = self.policy.optimizer(name)
            if policy.weights_dtype == "bf16":
                network.to(torch.bfloat16)
            if self.policy.fsdp != "none":
                own_names = {n.split(".", 1)[1]: block for n, block in self._blocks[id(network)].items()}
                before = self._params_by_phase(network)
                fsdp.shard(network, own_names, self.device, offload=self.policy.fsdp == "offload")
                self._sharded.append(network)
                self._hand_over(network, before)
            elif policy.weights == "stream":
                self._streams[id(network)] = BlockStream(
                    network, self._blocks[id(network)], self.device, resident=self.policy.resident
                )
            else:
                network.to(self.device)
        self._place_frozen()

    def _place_frozen(self) -> None:
        for key, network in self._frozen.items():
            blocks = self._blocks[key]
            if key in self._streams:
                continue
            if self.policy.frozen == "stream" and blocks:
                self._streams[key] = BlockStream(
                    network, blocks, self.device, stay=self._changing(), resident=self.policy.resident
                )
            else:
                network.to(self.device)

    def _changing(self) -> set[nn.Parameter]:
        """Parameters that are trained or averaged, which may sit inside frozen networks."""
        networks = [*self._networks.values(), *(average.target for average in self.averages)]
        return {parameter for network in networks for parameter in network.parameters()}

    def _hand_over(self, network: nn.Module, before: list[list[nn.Parameter]]) -> None:
        """Sharding replaces parameters by new ones: optimizers and their groups follow. before: `_params_by_phase`."""
        after = self._params_by_phase(network)
        new = {old: own for olds, owns in zip(before, after, strict=True) for old, own in zip(olds, owns, strict=True)}
        for phase in self.phases:
            for group in phase.optimizer.param_groups:
                group["params"] = [new.get(param, param) for param in group["params"]]

    def _params_by_phase(self, network: nn.Module) -> list[list[nn.Parameter]]:
        return [phase.parameters() for phase in self.phases if network in phase.networks]

    def _make_updater(self, name: str, policy: OptimizerPolicy | None = None) -> Updater:
        phases = [phase for phase in self.phases if self.optimizer_names[phase.name] == name]
        networks = {id(n): n for phase in phases for n in phase.networks}
        blocks: dict[str, list[nn.Parameter]] = {}
        streams: dict[str, BlockStream] = {}
        for key in networks:
            for block_name, block in self._blocks[key].items():
                stream = self._streams.get(key)
                if stream is None:
                    blocks[block_name] = list(block.parameters())
                elif block_name in stream.staying:
                    blocks[block_name] = stream.staying[block_name]
                else:  # what several blocks share stays on the device
                    blocks[block_name], streams[block_name] = stream.params[block_name], stream
        return Updater(
            name,
            phases[0].optimizer,
            self.policy.optimizer(name) if policy is None else policy,
            blocks=blocks,
            streams=streams,
            device=self.device,
            seed=self.seed,
            scale=precision.LossScale() if self.policy.precision == "fp16" else None,
            zero_nonfinite=self._zero_nonfinite,
            sharded=self.policy.fsdp != "none",
            sum_over_processes=self._sum,
        )

    def _place_averages(self) -> None:
        for average in self.averages:
            average.target.to("cpu" if self.policy.ema == "host" else self.device)

    def _set_micro_batches(self) -> None:
        for phase in self.phases:
            wanted = self.policy.phase(phase.name).micro_batch
            if wanted is not None:
                phase.micro_batch = wanted

    def _named_networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Each network once, with the name of its optimizer."""
        seen: set[int] = set()
        for phase in self.phases:
            for network in phase.networks:
                if id(network) not in seen:
                    seen.add(id(network))
                    yield self.optimizer_names[phase.name], network

    def _find_all(self, given: Mapping[nn.Module, Mapping[str, nn.Module]] | None) -> dict[int, dict[str, nn.Module]]:
        """The blocks of each network, named apart from those of others."""
        in_frozen = {p for network in self._frozen.values() for p in network.parameters()}
        found: dict[int, dict[str, nn.Module]] = {}
        for index, (key, network) in enumerate((*self._networks.items(), *self._frozen.items())):
            # Layers in training inside a frozen network's blocks are no blocks of their own: they run within those.
            inside = key in self._networks and any(p in in_frozen for p in network.parameters())
            own = {} if inside else blocks_of(network, given)
            found[key] = {f"{index}.{name}": block for name, block in own.items()}
        return found

    def _facts_by_name(self) -> dict[str, PhaseFacts]:
        return {phase.name: self.facts(phase) for phase in self.phases}

    def _summed(self, value: Tensor) -> Tensor:
        return value if self._sum is None else self._sum(value)
