"""The blocks of a network: the modules that are recomputed, streamed or sharded as one."""

from collections.abc import Iterator, Mapping

from torch import nn

from lowvram.errors import LowVRAMError

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name, in the order they were registered. No block contains another.

    A network may name them itself, by a method `blocks() -> dict[str, nn.Module]`. Otherwise they are found by
    structure: modules with parts, such as residual and transformer blocks. A stage (a module whose parameters all lie
    in lists of modules) and a stack (two or more like blocks in a list, that hold most of its parameters) are looked
    into. Bare layers (convolutions, linear layers, norms) are not blocks.

    Raises:
        LowVRAMError: there is none, or the network names blocks that overlap or are not its own.
    """
    if callable(getattr(type(network), "blocks", None)):  # of the class: an attribute `blocks` may be a ModuleList
        blocks = dict(network.blocks())  # type: ignore[operator]
        _check(network, blocks)
    else:
        blocks = {}
        for name, block in _blocks_below(network, ""):
            if all(block is not known for known in blocks.values()):  # a module may be registered twice
                blocks[name] = block
    if not blocks:
        raise LowVRAMError(
            f"{type(network).__name__} has no blocks that could be recomputed, streamed or sharded.",
            "Give it a method blocks() that returns its blocks by name, or use activations=keep or offload, "
            "weights=device and fsdp=none for it.",
        )
    return blocks


def blocks_of(
    network: nn.Module, given: Mapping[nn.Module, Mapping[str, nn.Module]] | None = None
) -> dict[str, nn.Module]:
    """A network's blocks by name: those that are given for it, or else found; none where its structure shows none."""
    if given is not None and network in given:
        return dict(given[network])
    try:
        return find_blocks(network)
    except LowVRAMError:
        return {}


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not _has_parameters(child):
            continue
        path = f"{prefix}{name}"
        if isinstance(child, _CONTAINERS):
            inner = list(_blocks_below(child, f"{path}."))
            layers = sum(_has_parameters(element) for element in child.children())
            if not inner and isinstance(child, nn.Sequential) and layers > 1:
                yield path, child  # layers that are called as one
            yield from inner
        elif _is_stage(child) or _is_stack(child):
            yield from _blocks_below(child, f"{path}.")
        elif _is_block(child):
            yield path, child


def _is_block(module: nn.Module) -> bool:
    """Whether a module is more than a bare layer: it has parts with parameters, and is no list of modules."""
    return not isinstance(module, _CONTAINERS) and any(_has_parameters(child) for child in module.children())


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """What the lists right below a module hold; lists within lists count as one."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from (element for element in child.children() if not isinstance(element, _CONTAINERS))
            yield from _elements(child)


def _is_stage(module: nn.Module) -> bool:
    """Whether all parameters lie in lists, some of which hold blocks: it only calls them one after the other."""
    loose = any(not isinstance(child, _CONTAINERS) and _has_parameters(child) for child in module.children())
    own = any(True for _ in module.parameters(recurse=False))
    return not loose and not own and any(_is_block(element) for element in _elements(module))


def _is_stack(module: nn.Module) -> bool:
    """Whether two or more like blocks in a list hold most of the parameters, as in a deep transformer."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            blocks = [element for element in child.children() if _is_block(element)]
            alike = len({type(block) for block in blocks}) == 1
            if len(blocks) > 1 and alike and 2 * sum(map(_size, blocks)) > _size(module):
                return True
    return False


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check(network: nn.Module, blocks: dict[str, nn.Module]) -> None:
    own = {id(module) for module in network.modules()} - {id(network)}
    seen: dict[int, str] = {}
    for name, block in blocks.items():
        if id(block) not in own:
            raise LowVRAMError(
                f"{type(network).__name__}.blocks() names {name}, which is not a module inside it.",
                "Return modules below the network.",
            )
        for module in block.modules():
            if id(module) in seen:
                raise LowVRAMError(
                    f"{type(network).__name__}.blocks(): {seen[id(module)]} and {name} share a module.",
                    "Return blocks that do not contain one another.",
                )
        seen.update((id(module), name) for module in block.modules())
