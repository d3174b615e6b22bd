"""Losses of others, watched as they run on fake tensors, so that what goes wrong is said in their own terms."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from lowvram.errors import LowVRAMError
from lowvram.phase import MicroBatch, Phase


class Watch:
    """The loss of a phase, with its errors made clear: `loss` is called in the place of `phase.loss`.

    networks: all that planning knows of. What else the loss runs would be missed in the count of memory, and real
    parameters would get gradients that are fake.
    """

    def __init__(self, phase: Phase, networks: Iterable[nn.Module]) -> None:
        self.phase = phase
        self._known = {module for network in networks for module in network.modules()}

    def loss(self, micro: MicroBatch) -> Tensor | Iterator[Tensor]:
        """As `Phase.loss`."""
        with self._watching(len(micro)):
            loss = self.phase.loss(micro)
        if isinstance(loss, Tensor):
            self._check(loss)
            return loss
        if not hasattr(loss, "__iter__"):
            raise self._error(f"its loss is a {type(loss).__name__}", "Return a scalar tensor, the mean over samples.")
        return self._terms(iter(loss), len(micro))

    def _terms(self, terms: Iterator[Tensor], n: int) -> Iterator[Tensor]:
        while True:
            with self._watching(n):
                term = next(terms, None)
            if term is None:
                return
            self._check(term)
            yield term
            del term

    @contextmanager
    def _watching(self, n: int) -> Iterator[None]:
        hook = register_module_forward_pre_hook(self._entered)
        try:
            yield
        except LowVRAMError:
            raise
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            what = str(getattr(error, "func", error))
            raise self._error(
                f"its loss makes a tensor whose shape depends on values ({what}), which a plan can't know",
                "Keep the shape: torch.where or a product with the mask, in place of nonzero, unique and x[mask].",
            ) from error
        except Exception as error:
            said = str(error).strip().split("\n")[0][:200]
            raise self._error(
                f"its loss failed on {n} samples without values, {type(error).__name__}: {said}",
                "Does it bear so many? Tensors that it makes belong beside the samples (device=micro.images.device), "
                "modules that it uses in plan_memory(networks={'name': module}).",
            ) from error
        finally:
            hook.remove()

    def _entered(self, module: nn.Module, _: Any) -> None:
        own = (*module._parameters.values(), *module._buffers.values())
        if module not in self._known and any(t is not None and not isinstance(t, FakeTensor) for t in own):
            raise self._error(
                f"its loss runs a {type(module).__name__} that planning does not know of",
                "Name the network that it is of: plan_memory(networks={'name': network}), in apply too.",
            )

    def _check(self, loss: Tensor) -> None:
        if loss.dim():
            raise self._error(f"its loss has shape {list(loss.shape)}", "Return a scalar, the mean over samples.")
        if not loss.requires_grad:
            raise self._error(
                "its loss does not depend on a parameter in training",
                "Is it computed under no_grad, detached, or by another network than those of the phase?",
            )
        for leaf in _leaves(loss):
            if not isinstance(leaf, FakeTensor):
                raise self._error(
                    f"its loss depends on a parameter of shape {list(leaf.shape)} that is of no network it names",
                    "Put it into a module, and name that in Phase(networks=...).",
                )

    def _error(self, problem: str, remedy: str) -> LowVRAMError:
        return LowVRAMError(f"phase {self.phase.name}: {problem}.", remedy)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves that a backward would give gradients to."""
    seen: set[Any] = set()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        left += [after for after, _ in node.next_functions]
