"""The constants of a card: what they add, how they learn, and that no file can break a plan."""

import json
import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram.errors import LowVRAMError
from lowvram.memory import guard
from lowvram.planner import calibration, cards
from lowvram.planner.calibration import Constants

MIB, GIB = 2**20, 2**30
CARD = cards.find("RTX 3060")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))


def test_defaults_by_card() -> None:
    usual = calibration.default(CARD)
    assert usual == Constants()
    assert usual.context_bytes == guard.CONTEXT_BYTES
    assert usual.workspace_bytes == 2 * (8 * MIB + 128 * 1024) + MIB + 64 * MIB
    assert calibration.default(cards.find("H100")).workspace_bytes == (2 * 32 + 1 + 64) * MIB
    assert usual.measurements == 0


def test_what_is_needed() -> None:
    constants = Constants(
        context_bytes=400 * MIB, workspace_bytes=100 * MIB, reserved_factor=1.1, margin_fraction=0.05, margin_bytes=MIB
    )
    assert calibration.allocator_bytes(1000 * MIB, constants) == pytest.approx(1200 * MIB, abs=1)
    assert calibration.needed_bytes(1000 * MIB, constants) == pytest.approx(1600 * MIB, abs=1)
    assert calibration.margin(1000 * MIB, constants) == pytest.approx(60 * MIB, abs=1)
    assert calibration.margin(1000 * MIB, replace(constants, margin_bytes=64 * MIB)) == 64 * MIB


@pytest.mark.parametrize("name", list(asdict(Constants())))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**12, 10**400, "1", None, True, [1]])
def test_impossible_constants(name: str, value: object) -> None:
    with pytest.raises(LowVRAMError, match=name):
        Constants(**{name: value})


def measure(constants: Constants, predicted: int, reserved: int, device: int, **times: float) -> Constants:
    return calibration.corrected(
        constants,
        predicted_reserved_bytes=predicted,
        measured_reserved_bytes=reserved,
        predicted_device_bytes=calibration.needed_bytes(predicted, constants),
        measured_device_bytes=device,
        **times,
    )


def test_too_low_a_prediction_is_mended_at_once() -> None:
    before = Constants()
    after = measure(before, 4 * GIB, 4400 * MIB, 5000 * MIB)
    assert after.reserved_factor == pytest.approx((4400 * MIB - before.workspace_bytes) / (4 * GIB))
    assert after.context_bytes == 600 * MIB
    assert calibration.needed_bytes(4 * GIB, after) == pytest.approx(5000 * MIB, abs=2)
    assert after.margin_fraction == before.margin_fraction  # a first measurement sets the level, and is no scatter
    assert after.measurements == 1


def test_too_high_a_prediction_is_mended_by_halves() -> None:
    before = Constants(workspace_bytes=0, context_bytes=600 * MIB, measurements=3)
    after = measure(before, 4 * GIB, 3686 * MIB, 4086 * MIB)  # 0.9 of it, and 400 MiB
    assert after.reserved_factor == pytest.approx(0.95, abs=1e-3)
    assert after.context_bytes == 500 * MIB


def test_a_small_recipe_moves_no_factor() -> None:
    """Twice of 100 MiB would become twice of 4 GiB."""
    before = Constants()
    after = measure(before, 100 * MIB, 300 * MIB, 800 * MIB)
    assert after.reserved_factor == 1.0
    assert after.workspace_bytes == 200 * MIB
    assert measure(after, 100 * MIB, 200 * MIB, 700 * MIB).workspace_bytes == 150 * MIB


def test_what_no_factor_explains_are_workspaces() -> None:
    after = measure(Constants(workspace_bytes=0), GIB, 2 * GIB, 2500 * MIB)
    assert after.reserved_factor == 1.5
    assert after.workspace_bytes == GIB // 2


def test_a_reading_after_memory_was_given_back_says_nothing_of_the_context() -> None:
    before = Constants(context_bytes=500 * MIB)
    assert measure(before, 4 * GIB, 4 * GIB, 3 * GIB).context_bytes == 500 * MIB
    assert measure(before, 4 * GIB, 4 * GIB, 40 * GIB).context_bytes == 2 * GIB  # another program grew meanwhile


def test_scatter_widens_the_margin_and_calm_narrows_it() -> None:
    known = Constants(measurements=1)
    whole = calibration.needed_bytes(4 * GIB, known)
    missed = measure(known, 4 * GIB, 4 * GIB, int(whole * 1.1))
    assert missed.margin_fraction == pytest.approx(0.1, rel=1e-3)
    after = missed
    for _ in range(20):
        exact = calibration.needed_bytes(4 * GIB, after)
        after = measure(after, 4 * GIB, calibration.allocator_bytes(4 * GIB, after), exact)
    assert after.margin_fraction == pytest.approx(0.03, rel=1e-2)
    assert after.measurements == 22


def test_time_is_set_once_and_smoothed_then() -> None:
    first = measure(Constants(), GIB, GIB, GIB, predicted_seconds=1.0, measured_seconds=2.0)
    assert first.time_factor == pytest.approx(2)
    second = measure(first, GIB, GIB, GIB, predicted_seconds=1.0, measured_seconds=16.0)
    assert second.time_factor == pytest.approx(4)  # a third of three more doublings
    assert measure(second, GIB, GIB, GIB).time_factor == second.time_factor
    assert measure(second, GIB, GIB, GIB, predicted_seconds=1.0, measured_seconds=0.0).time_factor == second.time_factor


@given(
    predicted=st.integers(0, 100 * GIB),
    ratio=st.floats(0.3, 1.4),
    context=st.integers(100 * MIB, 2 * GIB),
    factor=st.floats(0.5, 1.5),
    measurements=st.integers(0, 5),
)
def test_the_same_prediction_is_not_exceeded_again(
    predicted: int, ratio: float, context: int, factor: float, measurements: int
) -> None:
    before = Constants(reserved_factor=factor, measurements=measurements)
    reserved = int(predicted * ratio)
    after = measure(before, predicted, reserved, reserved + context)
    assert calibration.allocator_bytes(predicted, after) >= reserved
    assert calibration.needed_bytes(predicted, after) >= reserved + context
    again = measure(after, predicted, reserved, reserved + context)
    assert calibration.needed_bytes(predicted, again) <= calibration.needed_bytes(predicted, after)  # and comes closer


@given(
    numbers=st.lists(st.integers(-(2**60), 2**60), min_size=4, max_size=4), times=st.tuples(st.floats(), st.floats())
)
def test_any_measurement_gives_possible_constants(numbers: list[int], times: tuple[float, float]) -> None:
    after = calibration.corrected(
        Constants(measurements=2),
        predicted_reserved_bytes=numbers[0],
        measured_reserved_bytes=numbers[1],
        predicted_device_bytes=numbers[2],
        measured_device_bytes=numbers[3],
        predicted_seconds=times[0],
        measured_seconds=times[1],
    )
    assert after.measurements == 3  # it was made, so it passed its own check


# Kept.


def test_saved_and_loaded(tmp_path: Path) -> None:
    assert calibration.load(CARD) == calibration.default(CARD)
    kept = Constants(reserved_factor=1.07, context_bytes=500 * MIB, time_factor=1.3, measurements=4)
    file = calibration.save(CARD, kept)
    assert file is not None
    assert file.is_relative_to(tmp_path)
    assert calibration.load(CARD) == kept
    assert calibration.load(cards.find("RTX 3070")) == Constants()
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # nothing is left half-written
    calibration.save(CARD, replace(kept, measurements=5))
    assert calibration.load(CARD).measurements == 5


def test_another_torch_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.save(CARD, Constants(measurements=4))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert calibration.load(CARD).measurements == 0


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b\\c:d", "x" * 500, "..", "", "Gerät\n"])
def test_a_card_of_any_name_stays_in_the_folder(name: str, tmp_path: Path) -> None:
    odd = replace(CARD, name=name)
    file = calibration.save(odd, Constants(measurements=1))
    assert file is not None
    assert file.parent == tmp_path / "calibration"
    assert calibration.load(odd).measurements == 1


def test_names_that_share_a_file_do_not_share_constants(caplog: pytest.LogCaptureFixture) -> None:
    calibration.save(replace(CARD, name="X/1"), Constants(measurements=1))
    assert calibration.load(replace(CARD, name="X-1")).measurements == 0
    assert "another card's" in caplog.text


def _content(**constants: object) -> str:
    values = asdict(Constants(measurements=7)) | constants
    return json.dumps({"version": 1, "card": CARD.name, "torch": torch.__version__, "constants": values})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[" * 60_000,
        b"7" * 60_000,
        b" " * 70_000,
        b'{"version": 2}',
        b'{"version": 1, "card": "RTX 3060"}',
        _content(reserved_factor=float("nan")).encode(),
        _content(reserved_factor=float("inf")).encode(),
        _content(reserved_factor=0).encode(),
        _content(reserved_factor="1").encode(),
        _content(context_bytes=-(2**40)).encode(),
        _content(workspace_bytes=1.5).encode(),
        _content(time_factor=10**300).encode(),
        _content(measurements=None).encode(),
        _content(extra=1).encode(),
        _content().replace('"torch"', '"tin"').encode(),
    ],
)
def test_a_broken_file_is_passed_over(text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file = calibration.path(CARD)
    file.parent.mkdir()
    file.write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert calibration.load(CARD) == calibration.default(CARD)
    assert "is passed over" in caplog.text
    assert len(caplog.text) < 1000
    calibration.save(CARD, Constants(measurements=2))  # and replaced
    assert calibration.load(CARD).measurements == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(asdict(Constants()))), inner),
        max_leaves=8,
    )
)
def test_any_json_is_survived(content: object) -> None:
    file = calibration.path(CARD)
    file.parent.mkdir(exist_ok=True)
    whole = {"version": 1, "card": CARD.name, "torch": torch.__version__, "constants": content}
    file.write_text(json.dumps(whole))
    assert calibration.load(CARD) == calibration.default(CARD)  # never all seven constants and possible


def test_a_good_file_of_the_same_shape_is_read() -> None:
    file = calibration.path(CARD)
    file.parent.mkdir()
    file.write_text(_content())
    assert calibration.load(CARD).measurements == 7


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
def test_a_pipe_is_not_waited_for() -> None:
    file = calibration.path(CARD)
    file.parent.mkdir()
    os.mkfifo(file)
    assert calibration.load(CARD) == calibration.default(CARD)


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "calibration").write_text("a file where the folder should be")
    assert calibration.save(CARD, Constants()) is None
    assert "cannot keep" in caplog.text
    assert calibration.load(CARD) == calibration.default(CARD)
