"""The transfer benchmark: what it makes of a style, and the whole command on tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY

from benchmarks import record, transfer
from lowvram import checkpoint
from lowvram.run import Run
from lowvram.weights import stylegan2 as weights

_NO_BUILTIN = tuple(word for word in TINY if not word.startswith(("data.builtin_count", "augment", "log_kimg")))


def points(**nearness: float) -> list[dict[str, Any]]:
    return [
        {"name": name, "details": {"values": {"swd_16": 0.0, "swd_mean": near, "frechet_x": 2 * near}}}
        for name, near in nearness.items()
    ]


def test_the_nearest_is_named_for_each_distance() -> None:
    found = points(before=3.0, transfer=1.0, scratch=2.0)
    assert transfer.nearest(found) == {"swd_mean": "transfer", "frechet_x": "transfer"}
    found[2]["details"]["values"]["frechet_x"] = 0.5
    assert transfer.nearest(found) == {"swd_mean": "transfer", "frechet_x": "scratch"}


@pytest.mark.parametrize("style", transfer.STYLES)
def test_a_style_keeps_the_shapes_and_changes_the_colours(style: str) -> None:
    picture = np.full((32, 32, 3), 220, np.uint8)
    picture[8:20, 8:20] = (200, 30, 30)
    changed = transfer.STYLES[style](picture)
    assert changed.shape == picture.shape and changed.dtype == np.uint8
    assert np.abs(changed.astype(int) - picture).mean() > 20
    edge, flat = (np.ptp(changed[:, rows].astype(int), axis=1).max() for rows in (slice(6, 11), slice(0, 5)))
    assert edge > 50 and flat == 0


@pytest.mark.slow
def test_the_command_writes_points_grids_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--out", str(out), "--images", "12", "--generated", "16", "--metrics", "swd", "--freeze-d", "2"]
    words += ["--pretrain-kimg", "0.016", "--kimg", "0.016", "data.builtin_count=24", *_NO_BUILTIN]
    try:
        transfer.main(words)
    except SystemExit as ended:  # so little training need not help: the exit status says whether it did
        assert "not the nearest" in str(ended.code)
    content = record.read(out / "transfer.json")
    assert [point["name"] for point in content["points"]] == ["before", "transfer", "scratch"]
    values = [point["details"]["values"]["swd_mean"] for point in content["points"]]
    assert len(set(values)) == 3 and min(values) > 0
    assert all((out / f"{name}.png").is_file() for name in transfer.NAMES)
    assert len(list((out / "few").glob("*.png"))) == 12 and len(list((out / "unseen").glob("*.png"))) == 16
    assert not {p.name for p in (out / "few").iterdir()} & {p.name for p in (out / "unseen").iterdir()}
    begun, tuned = (weights.read(out / "weights.safetensors")["D"].state, out / "runs" / "transfer")
    state = checkpoint.read(Run.open(tuned).find_checkpoint(), only=("D",)).tensors["D"]
    assert torch.equal(state["b16.fromrgb.weight"], begun["b16.fromrgb.weight"])
    assert not torch.equal(state["b4.fc.weight"], begun["b4.fc.weight"])
    assert "floor" in capsys.readouterr().out


def test_the_distance_of_coarse_pixels_sees_colours_and_layout() -> None:
    faces = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    faces[:, :, :8] //= 4  # dark at the top
    own, turned = (transfer.pixel_distance(faces[:32], other) for other in (faces[32:], faces[32:].flip(2)))
    assert 0 <= own < 0.2 * turned
    assert transfer.pixel_distance(faces, 255 - faces) > 5 * own
    assert transfer.pixel_distance(faces, faces) == pytest.approx(0, abs=1e-6)
