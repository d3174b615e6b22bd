"""What a card was found to need beyond the prediction: constants kept for each card and version of torch.

A process holds, beside what a replay of its requests says the allocator reserves, the libraries' workspaces (the
allocator's too) and the CUDA context (nobody's). These differ by card, driver and torch, so training compares each
prediction with what it measures and moves the constants, which the next plan starts from.
"""

import contextlib
import json
import logging
import math
import re
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lowvram.data.image_cache import cache_root
from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.planner.cards import Card

log = logging.getLogger(__name__)

MIB = 2**20
GIB = 2**30

# cuBLAS keeps a workspace for each thread that calls it: this process's own, and the one that runs the backward.
_CUBLAS_THREADS = 2
_CUBLAS_BYTES = 8 * MIB + 128 * 2**10
_CUBLAS_LARGE_BYTES = 32 * MIB  # compute capability 9 and 10
_CUBLASLT_BYTES = MIB
_CUDNN_BYTES = 64 * MIB  # an allowance: with benchmark mode off its heuristics choose algorithms of little workspace

_MARGIN_FRACTION, _MARGIN_BYTES = 0.03, 64 * MIB

# What can be true of any card; a file that says otherwise is damaged or foreign.
_BOUNDS: dict[str, tuple[float, float]] = {
    "context_bytes": (64 * MIB, 2 * GIB),
    "workspace_bytes": (0, 2 * GIB),
    "reserved_factor": (0.5, 1.5),
    "margin_fraction": (0.0, 0.25),
    "margin_bytes": (0, GIB),
    "time_factor": (0.02, 50.0),
    "measurements": (0, 10**9),
}
_LARGE_BYTES = 512 * MIB  # what is reserved below this says little of the factor, for the workspaces are as large
_FILE_BYTES = 64 * 2**10
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What turns a prediction into bytes of a device and seconds of a clock.

    context_bytes: outside of the allocator. workspace_bytes: in the allocator, asked for by libraries and so not in a
    trace. reserved_factor: reserved as measured, less the workspaces, by reserved as replayed. margin_fraction,
    margin_bytes: what a plan leaves free, the larger of the two. time_factor: seconds as measured by seconds as
    predicted. measurements: how many went into them; 0: all are defaults.

    Raises:
        LowVRAMError: a value that no card has.
    """

    context_bytes: int = guard.CONTEXT_BYTES
    workspace_bytes: int = _CUBLAS_THREADS * _CUBLAS_BYTES + _CUBLASLT_BYTES + _CUDNN_BYTES
    reserved_factor: float = 1.0
    margin_fraction: float = _MARGIN_FRACTION
    margin_bytes: int = _MARGIN_BYTES
    time_factor: float = 1.0
    measurements: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            number = whole or (isinstance(value, float) and "f" in _KIND[name])
            if not number or not least <= value <= most:  # a NaN is in no interval
                raise LowVRAMError(f"{name}={str(value)[:40]} is no constant of a card.", f"{least:g} to {most:g} are.")


_KIND = {field.name: "f" if isinstance(field.default, float) else "i" for field in fields(Constants)}


def default(card: Card) -> Constants:
    """The constants of a card that was never measured."""
    cublas = _CUBLAS_LARGE_BYTES if card.capability[0] in (9, 10) else _CUBLAS_BYTES
    return Constants(workspace_bytes=_CUBLAS_THREADS * cublas + _CUBLASLT_BYTES + _CUDNN_BYTES)


def allocator_bytes(reserved_bytes: int, constants: Constants) -> int:
    """What torch's allocator will have reserved, of what a replay says: corrected, with the libraries' workspaces."""
    return math.ceil(reserved_bytes * constants.reserved_factor) + constants.workspace_bytes


def needed_bytes(reserved_bytes: int, constants: Constants) -> int:
    """Bytes of the device that the process will hold: the allocator's and the context, without a margin."""
    return allocator_bytes(reserved_bytes, constants) + constants.context_bytes


def margin(reserved_bytes: int, constants: Constants) -> int:
    """Bytes that a plan leaves free for what the prediction misses."""
    share = math.ceil(allocator_bytes(reserved_bytes, constants) * constants.margin_fraction)
    return max(share, constants.margin_bytes)


def corrected(
    constants: Constants,
    *,
    predicted_reserved_bytes: int,
    measured_reserved_bytes: int,
    predicted_device_bytes: int,
    measured_device_bytes: int,
    predicted_seconds: float | None = None,
    measured_seconds: float | None = None,
) -> Constants:
    """The constants after a measurement.

    What was too small grows at once, so that the same prediction is not exceeded again; what was too large shrinks
    half of the way, for the next recipe may need more. Once a first measurement has set the level, a device that
    still held more than predicted widens the margin by as much. The time moves by a third of the ratio's logarithm,
    after the first measurement which sets it.

    Args:
        predicted_reserved_bytes: the replay's, as given to `needed_bytes`.
        measured_reserved_bytes: the peak of the allocator, workspaces included.
        predicted_device_bytes: from `needed_bytes` with these constants.
        measured_device_bytes: of this process alone: what others held before it began is taken off.
        predicted_seconds, measured_seconds: of the same work; predicted without `time_factor`.
    """
    changes: dict[str, Any] = {"measurements": min(constants.measurements + 1, int(_BOUNDS["measurements"][1]))}
    if predicted_reserved_bytes > 0 and measured_reserved_bytes > 0:
        changes |= _allocator(constants, predicted_reserved_bytes, measured_reserved_bytes)
    outside = measured_device_bytes - measured_reserved_bytes
    if outside >= _BOUNDS["context_bytes"][0]:  # less is no context: memory was given back between the two readings
        context = _bounded("context_bytes", _grown(constants.context_bytes, outside))
        changes["context_bytes"] = math.ceil(context)
    if predicted_device_bytes > 0 and measured_device_bytes > 0:
        miss = measured_device_bytes / predicted_device_bytes - 1 if constants.measurements else 0.0
        eased = (constants.margin_fraction + max(_MARGIN_FRACTION, min(miss, constants.margin_fraction))) / 2
        changes["margin_fraction"] = _bounded("margin_fraction", max(miss, eased))
    if predicted_seconds and measured_seconds and predicted_seconds > 0 and measured_seconds > 0:
        ratio = measured_seconds / predicted_seconds
        weight = 1 / 3 if constants.measurements else 1.0
        changes["time_factor"] = _bounded("time_factor", constants.time_factor ** (1 - weight) * ratio**weight)
    return replace(constants, **changes)


def _allocator(constants: Constants, predicted_bytes: int, measured_bytes: int) -> dict[str, float]:
    """The factor and the workspaces with which the allocator's bytes would have been right.

    A factor found on a small recipe would be multiplied up on a large one: its difference goes to the workspaces, as
    does what no factor explains.
    """
    factor, workspace = constants.reserved_factor, constants.workspace_bytes
    if predicted_bytes >= _LARGE_BYTES:
        factor = _bounded("reserved_factor", _grown(factor, (measured_bytes - workspace) / predicted_bytes))
        workspace = max(workspace, measured_bytes - math.floor(predicted_bytes * factor))
    else:
        workspace = math.ceil(_grown(workspace, measured_bytes - math.floor(predicted_bytes * factor)))
    return {"reserved_factor": factor, "workspace_bytes": int(_bounded("workspace_bytes", workspace))}


def _grown(before: float, found: float) -> float:
    return found if found >= before else (before + found) / 2


def _bounded(name: str, value: float) -> float:
    least, most = _BOUNDS[name]
    return max(least, min(most, value))


# Kept in the user's cache folder.


def path(card: Card) -> Path:
    """The file of a card's constants under this version of torch."""
    plain = [re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:60] for text in (card.name, torch.__version__)]
    return cache_root() / "calibration" / f"{plain[0]}_torch-{plain[1]}.json"


def load(card: Card) -> Constants:
    """What was saved for a card and this version of torch, else the defaults.

    A file that can't be read, is not ours or says what can't be is passed over, and the log says so.
    """
    file = path(card)
    try:
        if not file.is_file():  # nor open a pipe or a device, which might never end
            return default(card)
        with file.open("rb") as opened:
            text = opened.read(_FILE_BYTES + 1)
        if len(text) > _FILE_BYTES:
            raise ValueError("too long")
        return _read(json.loads(text), card)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, LowVRAMError) as error:
        reason = error.problem if isinstance(error, LowVRAMError) else str(error)
        log.warning("%s is passed over: %s. The card's usual constants are used.", file, reason[:200] or "damaged")
        return default(card)


def _read(content: Any, card: Card) -> Constants:
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError("it is no calibration of this version")
    if (content.get("card"), content.get("torch")) != (card.name, torch.__version__):
        raise ValueError("it is another card's, or another torch's")
    values = content.get("constants")
    if not isinstance(values, dict) or set(values) != set(_KIND):
        raise ValueError("its constants are not those of this version")
    return Constants(**values)


def save(card: Card, constants: Constants) -> Path | None:
    """Keep the constants for the next plan, whole or not at all; None, and a line in the log, where that fails."""
    file = path(card)
    content = {
        "version": _VERSION,
        "card": card.name,
        "torch": str(torch.__version__),
        "constants": asdict(constants),
    }
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".", suffix=".json", delete=False) as opened:
            temporary = opened.name
            json.dump(content, opened, indent=1)
        Path(temporary).replace(file)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        log.warning("cannot keep the card's constants in %s: %s", file, error.strerror or error)
        return None
    return file
