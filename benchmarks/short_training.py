"""A real training for a minute or so: does it learn, how fast, and does it keep to its budget of memory?

    python -m benchmarks.short_training recipe=faces64 vram=6GB [setting=value ...] [--seconds 60] [--grid FILE.png]
        [--json FILE]

It runs `python -m lowvram.train` and asks it to stop after so many seconds. The whole card's memory is watched from
outside by NVML, less what was in use before; where that passes `vram`, the point has an error, and the command fails.
--grid keeps the last grid of samples.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.device import DevicePeak, order_by_bus
from lowvram.memory.guard import in_gb
from lowvram.settings import parse_bytes

_LONGEST_STOP_SECONDS = 60  # to finish the step and save


def train(words: Sequence[str], folder: Path, *, limit_seconds: float) -> tuple[int, str]:
    """Run the command into a folder, asking it to stop after a time; its exit status, and the end of what it said."""
    command = [sys.executable, "-m", "lowvram.train", *words, f"out={folder}"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            try:
                process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                process.wait(_LONGEST_STOP_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        said.seek(0)
        return process.returncode, said.read()[-2000:]


def point(words: Sequence[str], folder: Path, *, device_bytes: int | None, status: int, said: str) -> dict[str, Any]:
    """What the run's metrics tell, and whether it kept to its budget."""
    settings = dict(word.split("=", 1) for word in words)
    vram_bytes = parse_bytes("vram", settings["vram"]) if "vram" in settings else None
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if "s_per_kimg" in line]
    error = None
    if not lines:
        error = f"no metrics were written; exit status {status}: {(said.strip().splitlines() or ['nothing said'])[-1]}"
    elif vram_bytes is not None and device_bytes is not None and device_bytes > vram_bytes:
        error = f"took {in_gb(device_bytes, up=True)} of the card, with vram={in_gb(vram_bytes)}"
    later = lines[1:] or lines  # the first waits for kernels
    seconds = [line["s_per_kimg"] / 1e3 for line in later]
    return record.point(
        "short_training",
        "training",
        recipe=settings.get("recipe"),
        overrides=[word for word in words if not word.startswith("recipe=")],
        images_per_second=1 / record.spread(seconds)["median"] if seconds else None,
        allocated_bytes=max((line["peak_allocated_bytes"] for line in lines), default=None),
        reserved_bytes=max((line["peak_reserved_bytes"] for line in lines), default=None),
        device_bytes=device_bytes,
        error=error,
        details={
            "kimg": lines[-1]["kimg"] if lines else 0,
            "seconds": lines[-1]["seconds"] if lines else None,
            "losses": {name: value for name, value in (lines[-1] if lines else {}).items() if name.startswith("loss")},
            "exit_status": status,
        },
    )


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="recipe=NAME and settings")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which it is asked to stop")
    parser.add_argument("--grid", type=Path, help="keep the last grid of samples there")
    parser.add_argument("--json", type=Path, help="write the point there")
    options = parser.parse_args()
    order_by_bus()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    watch = DevicePeak(device)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        begun = time.perf_counter()
        with watch.watching():
            status, said = train(options.settings, folder, limit_seconds=options.seconds)
        print(f"{said.strip()}\n{time.perf_counter() - begun:.0f} seconds in all")
        device_bytes = watch.peak_bytes if watch.by == "NVML" else None  # otherwise it would be this process's own
        found = point(options.settings, folder, device_bytes=device_bytes, status=status, said=said)
        grids = sorted(folder.glob("fakes_*.png"))
        if options.grid and grids:
            options.grid.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(grids[-1], options.grid)
    if options.json:
        record.write(options.json, [found], device=device)
    if found["error"]:
        sys.exit(found["error"])


if __name__ == "__main__":
    main()
