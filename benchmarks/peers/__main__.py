"""Our work beside that of the libraries that people would take, or beside plain training, in one run.

    python -m benchmarks.peers [--only timm_vit,optimizers] [--json FILE] [--seconds 5] [--small]

stylegan2               the phases of StyleGAN2's training, and the same networks in plain PyTorch
diffusers_unet          the UNet of a recipe, and diffusers' of the same layout as diffusers' scripts train it
torchvision_resnet50    torchvision's network under plan_memory(vram="4GB"), and trained plainly
timm_vit                the same of timm's vision transformer
optimizers              8-bit AdamW over whole networks: ours, bitsandbytes', torchao's; torch's own in fp32

Each comparison is a process of its own. In it every side is built alone, for its peak of memory; then all are, and do
their steps in turn, so that they meet the same machine in the same state. What is not installed is left out, and said.
On a CPU, or with --small, small networks are taken, and memory is counted operation by operation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.peers import diffusers_unet, networks, optimizers, plain_stylegan2, side
from benchmarks.peers.side import Missing

NAMES = ("stylegan2", "diffusers_unet", *networks.TRAININGS, "optimizers")
_LIMIT_SECONDS = 300  # of one comparison


def run_one(name: str, *, small: bool, budget_seconds: float) -> list[dict[str, Any]]:
    """One comparison in this process: prints its table and returns its points."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "optimizers":
        points = []
        for workload in optimizers.SMALL if small else optimizers.WHOLE:
            measured = optimizers.measure(workload, device, budget_seconds=budget_seconds)
            print(optimizers.table(workload, measured), flush=True)
            points += optimizers.points("peers", workload, measured)
        return points
    if name == "stylegan2":
        peers = plain_stylegan2.peers(small=small)
    elif name == "diffusers_unet":
        peers = [diffusers_unet.peer(small=small)]
    else:
        peers = [networks.peer(name, small=small)]
    points = []
    for peer in peers:
        found = side.compare(peer, device, budget_seconds=budget_seconds / len(peers))
        print(side.table(peer, found), flush=True)
        points += side.points(peer, found)
    return points


def run_apart(name: str, words: list[str], *, limit_seconds: float = _LIMIT_SECONDS) -> list[dict[str, Any]]:
    """The same in a new process; no points if something is not installed, one with the error if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "points.json"
        command = [sys.executable, "-m", "benchmarks.peers", "--here", name, "--json", str(path), *words]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=limit_seconds, check=False)
        except subprocess.TimeoutExpired:
            return [record.point("peers", name, error=f"not done in {limit_seconds:.0f} seconds")]
        if done.returncode == 0:
            found: list[dict[str, Any]] = json.loads(path.read_text())
            return found
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    print(f"{name}: {last}", flush=True)
    return [record.point("peers", name, error=last[:300])]


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NAMES), help="comparisons, separated by commas")
    parser.add_argument("--json", type=Path, help="write the points there too")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing a comparison")
    parser.add_argument("--small", action="store_true", help="small networks, as on a CPU")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one comparison, in this process
    options = parser.parse_args()
    small = options.small or not torch.cuda.is_available()
    if options.here:
        try:
            points = run_one(options.here, small=small, budget_seconds=options.seconds)
        except Missing as missing:
            print(f"{options.here}: left out: {str(missing).splitlines()[0]}", flush=True)
            points = []
        options.json.write_text(json.dumps(points))
        return
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no comparison is called {unknown[0]}: use {', '.join(NAMES)}")
    words = ["--seconds", str(options.seconds), *(["--small"] if options.small else [])]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = []
    for name in names:
        points += run_apart(name, words)
        if options.json:
            record.write(options.json, points, device=device)
    sys.exit(1 if any(point["error"] for point in points) else 0)


if __name__ == "__main__":
    main()
