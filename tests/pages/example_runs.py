"""Run folders as training leaves them, made without training; and what a page says, read by an HTML parser."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
from PIL import Image

from lowvram.config import load_recipe
from lowvram.receipt.ledger import Receipt, Session
from lowvram.run import Run

_NAMESPACE = "{http://www.w3.org/1999/xhtml}"


def metrics_line(step: int, *, batch: int = 16, **changes: Any) -> dict[str, Any]:
    """A line as the trainer writes it, with values that no two lines share."""
    kimg = step * batch / 1000
    return {
        "step": step,
        "kimg": kimg,
        "s_per_kimg": 70 + math.sin(step),
        "seconds": round(kimg * 70.123, 3),
        "loss/G": 1.2345678901234567 + 0.1 * math.sin(step / 9),
        "loss/D": 0.7 + 0.1 * math.cos(step / 9),
        "augment_p": step / 1e5,
        "peak_allocated_bytes": 2 * 2**30 + step,
        "peak_reserved_bytes": 3 * 2**30 + step,
        "device_bytes": 4 * 2**30 + step,
        **{f"seconds/{name}": 0.5 + step / 1e6 for name in ("G", "D")},
        **{f"peak_allocated_bytes/{name}": 2 * 2**30 + step for name in ("G", "D")},
        **{f"peak_reserved_bytes/{name}": 3 * 2**30 + step for name in ("G", "D")},
        "kwh": kimg * 0.0123,
        "card_hours": kimg * 0.0195,
        "watts": 150.0 + step / 1e3,
        **changes,
    }


def session(begun: int, first: int, last: int, **changes: Any) -> Session:
    """A session of half an hour at 150 watts."""
    values = {
        "id": f"{begun:032x}", "contributor": "", "machine": "RTX 2060", "cards": 1, "first_image": first,
        "begun": f"2026-01-{begun:02d}T08:00:00+00:00", "ended": f"2026-01-{begun:02d}T08:30:00+00:00",
        "last_image": last, "seconds": 1800.0, "joules": 270_000.0, "energy_by": "NVML", "per_hour": 0.4,
        "per_kwh": 0.0, "grams_per_kwh": 400.0, "currency": "$", "version": "0.1.0", "torch": "2.11.0", "vram": "6GB",
    }  # fmt: skip
    return Session(**{**values, **changes})


def write_grid(path: Path, size: int = 64, seed: int = 0) -> None:
    """Noise as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def run_folder(folder: Path, *words: str, lines: int = 40, every: int = 25, receipt: bool = True) -> Path:
    """A run of faces32 with `lines` lines of metrics, three grids, a checkpoint, and two sessions in its receipt."""
    settings = load_recipe("faces32", ["kimg=16", "batch=16", f"out={folder}", *words])
    Run(folder, settings, is_new=True).prepare()
    values = [json.dumps(metrics_line(step)) for step in range(every, every * lines + 1, every)]
    (folder / "metrics.jsonl").write_text("\n".join(values) + "\n")
    write_grid(folder / "reals.png")
    for n, kimg in enumerate((0, 8, 16)):
        write_grid(folder / f"fakes_{kimg:06d}.png", seed=n + 1)
    checkpoint = folder / "checkpoints" / "step-00001000"
    checkpoint.mkdir(parents=True)
    (checkpoint / "G_ema.safetensors").write_bytes(bytes(1000))
    (checkpoint / "state.json").write_text(json.dumps({"dataset": {"name": "the built-in faces"}}))
    if receipt:
        sessions = (session(1, 0, 8000, contributor="Ada"), session(2, 8000, 16000, contributor="Grace"))
        Receipt(sessions).write(folder)
    return folder


def write_evaluation(folder: Path, step: int, *, n: int = 64, truncation: float = 1.0, **values: Any) -> None:
    """What lowvram.evaluate leaves."""
    (folder / "metrics").mkdir(exist_ok=True)
    record = {
        "step": step, "seed": 0, "truncation": truncation, "values": values, "floor": {}, "generated_images": n,
        "real_images": 50,
    }  # fmt: skip
    name = f"evaluation-{step:08d}-n{n}-seed0-truncation{truncation:g}.json"
    (folder / "metrics" / name).write_text(json.dumps(record))


@dataclass
class Page:
    """A page's tree. Strictly parsed: anything that is no valid HTML is an error."""

    path: Path

    def __post_init__(self) -> None:
        self.source = self.path.read_text(encoding="utf-8")
        parser = html5lib.HTMLParser(strict=True)
        self.tree = parser.parse(self.source)

    def all(self, tag: str) -> list[Any]:
        """Elements by tag."""
        return [element for element in self.tree.iter() if element.tag in (tag, _NAMESPACE + tag)]

    def text(self, element: Any = None) -> str:
        """What a reader sees, one space between words; not the script or the style sheet."""
        root = self.all("body")[0] if element is None else element
        return " ".join(" ".join(_texts(root)).split())

    def charts(self) -> dict[str, list[list[str]]]:
        """The tables of values under the charts, by title: rows of cells."""
        found = {}
        for figure in self.all("figure"):
            rows = list(figure.iter(f"{_NAMESPACE}tr"))
            if rows and figure.get("class") == "chart":
                title = self.text(next(figure.iter(f"{_NAMESPACE}figcaption")))
                found[title] = [[self.text(cell) for cell in row] for row in rows[1:]]
        return found


def _texts(element: Any) -> list[str]:
    if not isinstance(element.tag, str) or element.tag.endswith(("script", "style")):
        return []
    out = [element.text or ""]
    for child in element:
        out += [*_texts(child), child.tail or ""]
    return out
