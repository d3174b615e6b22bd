"""Memory as the planner predicts it beside memory as it is measured, for recipes under several policies.

    python -m benchmarks.memory_prediction [--recipes faces64,faces256,...] [--policies plain,6GB,...] [--json FILE]

A recipe is NAME or NAME:BATCH. Policies: `plain`, the recipe as it is written; `card`, the plan for the card; a budget
such as `6GB`, the plan for it, run under that cap; `half`, the same with half of what `plain` needs; and the names of
benchmarks.policy_sets. Each run is a process of its own, so that the allocator begins empty: the task and its policy
as in training, every phase a few times with the heaviest first, the averages, sampling.

On a GPU live bytes are torch's max_memory_allocated, reserved ones its max_memory_reserved, and the device's are
NVML's (pynvml) while it runs, less what was in use before; without pynvml the driver's at the end of each phase. The
libraries' workspaces are in the measured live bytes, not in the predicted. What is above the prediction and its margin
is flagged, and the card's constants (lowvram.planner.calibration) are corrected with all runs at the end.

Without a GPU the operations are tried, not the card: live bytes counted in a real fp32 run (lowvram.memory.tracer)
beside the planner's trace of that run, in the CPU's memory formats.

The JSON is of the schema of benchmarks.record: a point for each run, with what was predicted in its details.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import measured_memory, policy_sets, record
from lowvram import load_recipe, standin
from lowvram.config import report_errors
from lowvram.errors import LowVRAMError
from lowvram.memory.guard import in_gb
from lowvram.memory.ladder import PhaseFacts
from lowvram.memory.policy import MemoryPolicy
from lowvram.planner import calibration, cards
from lowvram.planner.allocator import replay
from lowvram.planner.calibration import Constants
from lowvram.planner.cards import Card
from lowvram.planner.compose import highest
from lowvram.planner.estimate import Choice, Estimator
from lowvram.planner.own import autocast_for
from lowvram.planner.pieces import Pieces
from lowvram.planner.recipe import plan_recipe, subject_of
from lowvram.planner.tracing import Job, Recorded, Structure
from lowvram.settings import Settings, parse_bytes
from lowvram.tasks import task_class

ON_GPU = {
    "recipes": "faces64,faces128,faces256,faces512,faces1024,faces256_vae,faces256_ldm,faces256_dit,faces512_ldm",
    "policies": "plain,card,6GB,half,recompute,streamed,leanest",
}
ON_CPU = {
    "recipes": "faces32:8,faces64:4",
    "policies": "plain,recompute,offload R1 and path length,fused G,deferred,state on the host,lean,streamed,leanest",
}
CPU_FRACTION = 0.01  # a count of the same operations should be the same; what differs by more is flagged


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe under a policy. overrides: all of its settings; vram_bytes: the cap of the run, None: none."""

    recipe: str
    policy: str
    overrides: tuple[str, ...]
    vram_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner says of a case. live_bytes, reserved_bytes: by part of the step, without workspaces.

    replayed_bytes: the most that the allocator reserves, not corrected by the card's constants. seconds: of a step,
    not corrected either. sampled: images at a time.
    """

    live_bytes: dict[str, int]
    reserved_bytes: dict[str, int]
    replayed_bytes: int
    seconds: float
    sampled: int


class _Exact(Estimator):
    """Every number of samples is recorded itself: on a CPU formats depend on it, so that nothing is proportional."""

    def recorded(self, phase: PhaseFacts, choice: Choice) -> Recorded:
        return self.pieces.get(self.job(phase, choice))

    def _sampled(self, slice_: int) -> Recorded:
        return self.pieces.get(Job(structure=self.structure, what="sample", samples=slice_))


@contextmanager
def _as_on_a_cpu() -> Iterator[None]:
    """A trace's tensors stand for a CPU's: what chooses by the device gets the answer that a real run gets."""
    with mock.patch.object(standin, "is_gpu", lambda device: device.type != "cpu"):
        yield


class Predictor:
    """Predictions for one recipe. card: None: of a run on the CPU."""

    def __init__(self, settings: Settings, card: Card | None) -> None:
        self.card = card
        self._around: Callable[[], Any] = nullcontext if card is not None else _as_on_a_cpu
        self._pieces = Pieces(subject_of(settings), processes=None if card is not None else 1)

    def close(self) -> None:
        """End its processes."""
        self._pieces.close()

    def predict(self, settings: Settings) -> Prediction:
        """The parts of a step of the recipe under the settings' policy."""
        names = settings.phase_names()
        precision = "fp32"
        if self.card is not None and not task_class(settings).own_precision:
            precision = autocast_for(settings.precision, self.card)
        policy = MemoryPolicy.from_settings(settings, phases=names, precision=precision)
        if self.card is None:  # a CPU's memory is the host's: there the average is moved nowhere
            policy = replace(policy, ema="device")
        kind = Estimator if self.card is not None else _Exact
        card = self.card or cards.for_budget(6 * 2**30)
        structure = Structure.of(policy, triton=self.card is not None and cards.runs_triton(self.card))
        estimator = kind(self._pieces, structure, card)
        with self._around():
            if self.card is not None:
                estimator.settle(policy)
            requests = estimator.requests(policy)
            seconds, _ = estimator.seconds(policy)
            sampled = estimator.sampling_slice(policy)
        parts = {name: part.live_bytes for name, part in highest(requests).items() if name not in ("start", "saving")}
        replayed = replay(requests)
        return Prediction(
            live_bytes=parts,
            reserved_bytes={name: replayed.by_mark[name] for name in parts},
            replayed_bytes=replayed.reserved_bytes,
            seconds=seconds,
            sampled=sampled,
        )


def cases(recipe: str, policies: list[str], card: Card | None) -> Iterator[tuple[Case, Prediction | str]]:
    """The runs of a recipe and their predictions, or why there is none.

    Raises:
        LowVRAMError: the recipe or a policy is not known.
    """
    name, _, batch = recipe.partition(":")
    base = [*([f"batch={batch}"] if batch else []), "memory.policy=recipe"]
    if card is None:
        base += ["device=cpu", "precision=fp32"]
    settings = load_recipe(name, base)
    sets = policy_sets.of(settings)
    predictor = Predictor(settings, card)
    constants = Constants() if card is None else calibration.load(card)
    plain_bytes: int | None = None
    try:
        for policy in policies:
            vram: int | None = None
            words: list[str] = []
            if policy in sets and policy != "plain":
                words = sets[policy]
            elif policy == "half":
                if plain_bytes is None:
                    plain_bytes = calibration.needed_bytes(predictor.predict(settings).replayed_bytes, constants)
                vram = plain_bytes // 2
            elif policy not in ("plain", "card"):
                vram = parse_bytes("--policies", policy)
            if policy == "card" or vram is not None:
                if card is None:
                    raise LowVRAMError(f"the policy {policy!r} is a plan for a card.", "It needs a GPU.")
                limit = [f"vram={vram / 2**30:.3f}GB"] if vram is not None else []
                plan = plan_recipe(load_recipe(name, [*base, *limit]), card=card)
                words = [f"{setting}={value}" for setting, value in plan.settings.items()]
                if not plan.fits:
                    yield Case(recipe=recipe, policy=policy, overrides=(*base, *words), vram_bytes=vram), "nothing fits"
                    continue
            case = Case(recipe=recipe, policy=policy, overrides=(*base, *words), vram_bytes=vram)
            yield case, predictor.predict(load_recipe(name, list(case.overrides)))
    finally:
        predictor.close()


def run_apart(case: Case, prediction: Prediction, *, steps: int) -> dict[str, Any]:
    """What `benchmarks.measured_memory` measures of a case, in a process of its own."""
    order = sorted(prediction.live_bytes, key=lambda name: -prediction.live_bytes[name])
    asked = {
        "recipe": case.recipe.partition(":")[0],
        "overrides": case.overrides,
        "vram_bytes": case.vram_bytes,
        "order": order,
        "sampled": prediction.sampled,
        "steps": steps,
    }
    return measured_memory.apart(asked)


def compared(case: Case, prediction: Prediction, measured: dict[str, Any], constants: Constants) -> dict[str, Any]:
    """A case's entry in the results: the parts with their figures, the device's, and what exceeds the prediction."""
    entry: dict[str, Any] = asdict(case) | {"parts": {}, "flags": []}
    if "error" in measured:
        return entry | {"error": measured["error"], "flags": [measured["error"]]}
    on_gpu = "device_bytes" in measured
    entry["every"] = measured.get("every", {})
    for name, found in measured["parts"].items():
        part = entry["parts"][name] = {
            "predicted_live_bytes": prediction.live_bytes[name],
            "measured_live_bytes": found["live_bytes"],
            "runs_seconds": found.get("runs_seconds", [found["seconds"]]),
        }
        if on_gpu:
            part |= {
                "predicted_reserved_bytes": calibration.allocator_bytes(prediction.reserved_bytes[name], constants),
                "measured_reserved_bytes": found["reserved_bytes"],
            }
        elif found["live_bytes"] > prediction.live_bytes[name] * (1 + CPU_FRACTION):
            entry["flags"].append(f"{name}: more live than predicted")
    if not on_gpu:
        return entry
    margin = calibration.margin(prediction.replayed_bytes, constants)
    needed = calibration.needed_bytes(prediction.replayed_bytes, constants)
    reserved = calibration.allocator_bytes(prediction.replayed_bytes, constants)
    entry |= {
        "predicted_replayed_bytes": prediction.replayed_bytes,
        "predicted_reserved_bytes": reserved,
        "measured_reserved_bytes": max(part["reserved_bytes"] for part in measured["parts"].values()),
        "predicted_device_bytes": needed,
        "measured_device_bytes": measured["device_bytes"],
        "margin_bytes": margin,
        "device_by": measured["device_by"],
        "predicted_seconds": prediction.seconds,
        "measured_seconds": measured["seconds"],
    }
    if entry["measured_reserved_bytes"] > reserved + margin:
        entry["flags"].append("more reserved than predicted")
    if entry["measured_device_bytes"] > needed + margin:
        entry["flags"].append("more of the device than predicted")
    if case.vram_bytes is not None and entry["measured_device_bytes"] > case.vram_bytes:
        entry["flags"].append(f"above its cap of {in_gb(case.vram_bytes)}")
    return entry


def learnt(entries: list[dict[str, Any]], constants: Constants) -> Constants:
    """The card's constants after all measurements."""
    for entry in entries:
        if "measured_device_bytes" not in entry:
            continue
        constants = calibration.corrected(
            constants,
            predicted_reserved_bytes=entry["predicted_replayed_bytes"],
            measured_reserved_bytes=entry["measured_reserved_bytes"],
            predicted_device_bytes=calibration.needed_bytes(entry["predicted_replayed_bytes"], constants),
            measured_device_bytes=entry["measured_device_bytes"],
            predicted_seconds=entry["predicted_seconds"],
            measured_seconds=entry["measured_seconds"],
        )
    return constants


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A point (`record.point`) for each case: what was measured; what was predicted is in its details."""
    return [_point(entry) for entry in result["cases"]]


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = entry["parts"]
    runs = {name: part["runs_seconds"] for name, part in parts.items()}
    in_a_step = [[s / n for s in runs[name]] for name, n in entry.get("every", {}).items() if name in runs]
    return record.point(
        "memory_prediction",
        entry["policy"],
        recipe=entry["recipe"].partition(":")[0],
        overrides=sorted(entry["overrides"]),
        seconds={name: record.spread(seconds) for name, seconds in runs.items()},
        seconds_per_step=record.spread([sum(step) for step in zip(*in_a_step, strict=True)]) if in_a_step else None,
        allocated_bytes=max((part["measured_live_bytes"] for part in parts.values()), default=None),
        reserved_bytes=entry.get("measured_reserved_bytes"),
        device_bytes=entry.get("measured_device_bytes"),
        error=entry.get("error"),
        details=entry,
    )


def table(result: dict[str, Any]) -> str:
    """For people: MB are 10^6 bytes."""
    rows = [f"{'recipe, policy':<44}{'part':<13}{'live: predicted':>16}{'measured':>10}{'':>8}"]
    if result["on_gpu"]:
        rows[0] += f"{'reserved: predicted':>20}{'measured':>10}{'':>8}"
    for entry in result["cases"]:
        title = f"{entry['recipe']}, {entry['policy']}"
        for name, part in entry["parts"].items():
            row = f"{title:<44}{name:<13}{_pair(part, 'live', 16)}"
            rows.append(row + (_pair(part, "reserved", 20) if result["on_gpu"] else ""))
            title = ""
        if "measured_device_bytes" in entry:
            rows.append(f"{title:<44}{'the device':<13}{_pair(entry, 'device', 16)}")
        rows += [f"{title}  !! {flag}" for flag in entry["flags"]]
    return "\n".join(rows)


def _pair(part: dict[str, Any], what: str, width: int) -> str:
    predicted, measured = part[f"predicted_{what}_bytes"], part[f"measured_{what}_bytes"]
    return f"{predicted / 1e6:>{width}.1f}{measured / 1e6:>10.1f}{100 * (predicted / measured - 1):>+7.2f}%"


def compare(recipes: list[str], policies: list[str], *, steps: int, card: Card | None) -> dict[str, Any]:
    """Everything: predictions, runs, and on a GPU the card's corrected constants, which are saved."""
    constants = Constants() if card is None else calibration.load(card)
    entries = []
    for recipe in recipes:
        for case, prediction in cases(recipe, policies, card):
            if isinstance(prediction, str):
                entries.append(asdict(case) | {"parts": {}, "flags": [], "error": prediction})
            else:
                measured = run_apart(case, prediction, steps=steps)
                entries.append(compared(case, prediction, measured, constants))
            said = "; ".join(entries[-1]["flags"]) or entries[-1].get("error", "as predicted, margin included")
            print(f"{recipe}, {case.policy}: {said}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "card": card.name if card is not None else record.device_name(torch.device("cpu")),
        "on_gpu": card is not None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cases": entries,
    }
    if card is not None:
        after = learnt(entries, constants)
        calibration.save(card, after)
        for entry in entries:
            entry |= {"constants": asdict(constants), "constants_after": asdict(after)}
    return result


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", help="NAME or NAME:BATCH, separated by commas")
    parser.add_argument("--policies", help="see above, separated by commas")
    parser.add_argument("--steps", type=int, default=2, help="runs of each phase")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/memory_prediction_CARD.json")
    options = parser.parse_args()

    def run() -> None:
        card = _card()
        usual = ON_CPU if card is None else ON_GPU
        recipes, policies = (
            [word.strip() for word in (getattr(options, what) or usual[what]).split(",") if word.strip()]
            for what in ("recipes", "policies")
        )
        result = compare(recipes, policies, steps=options.steps, card=card)
        print(table(result))
        path = options.json or record.RESULTS / f"memory_prediction_{record.slug(result['card'])}.json"
        record.write(path, points(result), device="cpu" if card is None else "cuda")

    report_errors(run, [])


def _card() -> Card | None:
    """The GPU that is there. Another process measures it, for this one must hold nothing of it."""
    if not torch.cuda.is_available():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measured_memory", "--card"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LowVRAMError("The card can't be measured.", done.stderr.strip()[-300:] or "Is it in use?")
    values = json.loads(done.stdout.splitlines()[-1])
    return replace(Card(**values), capability=tuple(values["capability"]))


if __name__ == "__main__":
    main()
