"""The one schema of all benchmarks: a file holds points, and the environment in which they were measured.

A file: {"schema": SCHEMA, "environment": {...}, "points": [...]}. A point is something timed or counted under one
setting; see `point`. `python -m benchmarks.report` makes a table of any of them, `python -m benchmarks.compare` finds
what became slower or larger.
"""

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = "lowvram-benchmark/1"
RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "bitsandbytes", "torchao", "diffusers", "accelerate", "lowvram")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Hardware, driver, versions and commit, for the head of a file."""
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(device),
        "driver": _driver(device),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions(),
        "commit": _commit(),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max", "iqr", "n"}: the range between the quartiles is the noise that a comparison allows."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "iqr": quartiles[2] - quartiles[0],
        "n": len(seconds),
    }


def point(
    benchmark: str,
    name: str,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    seconds: Mapping[str, dict[str, float]] | None = None,
    seconds_per_step: dict[str, float] | None = None,
    images_per_second: float | None = None,
    allocated_bytes: int | None = None,
    reserved_bytes: int | None = None,
    device_bytes: int | None = None,
    energy_joules_per_image: float | None = None,
    error: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One measurement. Two of the same benchmark, name, recipe and overrides can be compared.

    seconds: a `spread` for each phase, or for each thing timed. The bytes are peaks: of tensors (on a CPU counted
    operation by operation, lowvram.memory.tracer), of torch's allocator, of the whole device less what others used;
    the latter two are None on a CPU. error: what it failed with, in place of figures. details: whatever else the
    benchmark knows, as JSON.
    """
    return {
        "benchmark": benchmark,
        "name": name,
        "recipe": recipe,
        "overrides": list(overrides),
        "seconds": dict(seconds or {}),
        "seconds_per_step": seconds_per_step,
        "images_per_second": images_per_second,
        "memory": {
            "allocated_bytes": allocated_bytes,
            "reserved_bytes": reserved_bytes,
            "device_bytes": device_bytes,
        },
        "energy_joules_per_image": energy_joules_per_image,
        "error": error,
        "details": dict(details or {}),
    }


def write(
    path: Path,
    points: Sequence[Mapping[str, Any]],
    *,
    device: torch.device | str,
    measured_in: Mapping[str, Any] | None = None,
) -> None:
    """Write a file of points measured here and now; a file that is there is replaced at once, never half.

    measured_in: the `environment`, if this process must not ask the device for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "environment": measured_in or environment(device), "points": list(points)}
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
        ValueError: it is none.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a file of benchmark points ({SCHEMA})")
    return content


def slug(text: str) -> str:
    """A text as part of a file's name: letters and digits, and single hyphens for all between."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The card, or the CPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _hardware(device: torch.device) -> dict[str, Any]:
    cpu = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type != "cuda":
        return {"device": _cpu_name(), "memory_bytes": None, "capability": None, **cpu}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        **cpu,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return _output(query)


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in _PACKAGES}


def _commit() -> str | None:
    """The commit of this tree, with "+" where files differ from it; None outside of git."""
    folder = Path(__file__).parent
    commit = _output(["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"])
    changed = commit and _output(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+" if changed else commit


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
