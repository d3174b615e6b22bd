"""The plan's record: thinning out a timeline, words of the settings, and plan.json, also a hostile one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_plans import GIB, MIB, a_cost, a_phase, a_plan

from lowvram.config import load_recipe
from lowvram.errors import LowVRAMError
from lowvram.memory.policy import MemoryPolicy
from lowvram.planner.log import ACTIVATIONS, CATEGORIES, TEMPORARY, WEIGHTS, Requests
from lowvram.planner.plan import Alternative, Plan, Timeline, settings_of
from lowvram.planner.plan_file import JSON_POINTS
from lowvram.receipt.rates import Rates

PHASES = ("G", "path_length", "D", "R1")
POLICY = (
    MemoryPolicy(ema="host")
    .with_phase("G", micro_batch=16)
    .with_phase("R1", micro_batch=8, activations="offload")
    .with_phase("D", activations="recompute", recompute_every=2)
    .with_optimizer("G", kind="adam8bit")
    .with_optimizer("D", update="deferred", weights="stream", state="host", weights_dtype="bf16")
)


def make_plan(**changes: Any) -> Plan:
    phase = a_phase(
        "R1",
        3 * GIB,
        every=16,
        activations="offload",
        reserved_bytes=3 * GIB + 200 * MIB,
        by_category={"weights": GIB, "activations": 2 * GIB},
        host_bytes=2.5e9,
    )
    whole = a_plan(
        replace(phase, name="G", live_bytes=GIB, every=1),
        phase,
        policy=POLICY,
        live_bytes=3 * GIB,
        reserved_bytes=3 * GIB + 200 * MIB,
        context_bytes=430 * MIB,
        host_bytes=GIB,
        smallest_vram_bytes=4 * GIB,
        alternatives=(
            Alternative(what="micro_batch.G=32", device_bytes=7 * GIB, images_per_second=13.0, why="needs 1GB more"),
        ),
        settings=settings_of(POLICY, PHASES),
        notes=("größer",),
        rates=Rates(per_hour=0.4, per_kwh=0.1, grams_per_kwh=50.0, currency="€"),
        published=("41 days on one V100",),
        costs=(a_cost("H100", hours=20.0, kwh=12.0), a_cost("RTX 3050", fits=False)),
        timeline=Timeline.of(sawtooth(50), np.arange(100, dtype=np.int64)),
    )
    return replace(whole, **changes)


def sawtooth(teeth: int) -> Requests:
    """One allocation freed at once, again and again, each a little larger; the first third of the marks is short."""
    sizes = np.arange(1, teeth + 1, dtype=np.int64) * 512
    order = np.stack([np.arange(teeth), ~np.arange(teeth)], axis=1).reshape(-1)
    return Requests(
        order=order,
        sizes=sizes,
        categories=np.where(np.arange(teeth) % 2, ACTIVATIONS, TEMPORARY).astype(np.int8),
        makers=np.zeros(teeth, np.int32),
        names=("op",),
        marks=((0, "G"), (4, "nothing"), (4, "D")),
    )


@pytest.mark.parametrize("points", [7, 100, 1200])
def test_a_timeline_keeps_every_phase_and_the_peaks(points: int) -> None:
    requests = sawtooth(2000)
    reserved = np.maximum.accumulate(requests.live()) + 512
    timeline = Timeline.of(requests, reserved, points)
    assert len(timeline) <= points
    assert [name for name, _, _ in timeline.marks] == ["G", "nothing", "D"]
    (_, begin, end), (_, empty, also), (_, after, last) = timeline.marks
    assert (begin, last) == (0, len(timeline)) and end == empty == also == after > 0
    total = timeline.bytes.sum(axis=0)
    assert total[:end].max() == 2 * 512  # of G's two teeth
    assert total.max() == 2000 * 512
    assert timeline.bytes[ACTIVATIONS].max() == 2000 * 512 and timeline.bytes[TEMPORARY][-1] == 0
    assert timeline.reserved is not None and timeline.reserved.max() == 2000 * 512 + 512
    assert (timeline.reserved >= total).all()


def test_a_timeline_begins_at_the_first_mark_with_what_is_there() -> None:
    requests = Requests(
        order=np.array([0, 1, 2, ~2]),
        sizes=np.array([4096, 512, 1024]),
        categories=np.array([WEIGHTS, WEIGHTS, ACTIVATIONS], np.int8),
        makers=np.zeros(3, np.int32),
        marks=((2, "G"),),
    )
    timeline = Timeline.of(requests)
    assert timeline.marks == (("G", 0, 2),)
    assert timeline.bytes[WEIGHTS].tolist() == [4608, 4608]
    assert timeline.bytes[ACTIVATIONS].tolist() == [1024, 0]
    assert timeline.reserved is None
    with pytest.raises(LowVRAMError, match="each of 4 events"):
        Timeline.of(requests, np.zeros(3, np.int64))


def test_headroom_and_what_a_plan_refuses() -> None:
    plan = make_plan()
    assert plan.needed_bytes == 3 * GIB + 894 * MIB
    assert plan.headroom_bytes == 3 * GIB - 894 * MIB
    assert make_plan(vram_bytes=None).headroom_bytes is None
    assert make_plan(vram_bytes=3 * GIB, fits=False).headroom_bytes == -894 * MIB
    with pytest.raises(LowVRAMError, match="can't fit vram=3GB"):
        make_plan(vram_bytes=3 * GIB)
    with pytest.raises(LowVRAMError, match="not the sum"):
        make_plan(workspace_bytes=0)
    with pytest.raises(LowVRAMError, match="category grads of R1"):
        replace(plan.phases[1], by_category={"grads": 3})
    assert plan.phases[1].by_category["optimizer"] == 0
    assert replace(plan.phases[1], samples=60).micro_batches == 8


def test_the_settings_lead_back_to_the_policy() -> None:
    words = settings_of(POLICY, PHASES)
    assert words == {
        "micro_batch.G": "16",
        "micro_batch.R1": "8",
        "memory.activations.D": "recompute",
        "memory.activations.R1": "offload",
        "memory.recompute_every": "2",
        "memory.optimizer.G": "adam8bit",
        "memory.update.D": "deferred",
        "memory.state.D": "host",
        "memory.weights.D": "stream",
        "memory.weights_dtype.D": "bf16",
        "memory.ema": "host",
    }
    settings = load_recipe("faces64", [f"{name}={value}" for name, value in words.items()])
    policy = MemoryPolicy.from_settings(settings, phases=PHASES)
    recipe = MemoryPolicy.from_settings(load_recipe("faces64"), phases=PHASES)
    for name in ("R1", "G"):
        assert policy.phase(name).micro_batch == POLICY.phase(name).micro_batch
    assert policy.phase("D").recompute_every == 2
    assert policy.optimizers == {name: POLICY.optimizer(name) for name in ("G", "D")}
    assert settings_of(policy, PHASES, plain=recipe).keys() <= words.keys()


def test_settings_of_the_plain_policy_and_of_another_start() -> None:
    assert settings_of(MemoryPolicy(), PHASES) == {}
    assert settings_of(MemoryPolicy(), PHASES, plain=POLICY.with_phase("D", activations="keep")) == {
        "micro_batch.G": "null",
        "micro_batch.R1": "null",
        "memory.activations.R1": "keep",
        "memory.optimizer.G": "adam",
        "memory.update.D": "after",
        "memory.state.D": "device",
        "memory.weights.D": "device",
        "memory.weights_dtype.D": "fp32",
        "memory.ema": "device",
    }
    assert settings_of(MemoryPolicy(precision="bf16", fsdp="shard", attention="math"), ()) == {
        "precision": "bf16",
        "memory.attention": "math",
        "memory.fsdp": "shard",
    }
    mixed = POLICY.with_phase("G", activations="recompute")
    with pytest.raises(LowVRAMError, match=r"every 1\. and 2\. block"):
        settings_of(mixed, PHASES)
    assert "memory.activations.G" not in settings_of(mixed, ("D",))


def test_json_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    text = (tmp_path / "plan.json").read_bytes()
    assert text == Plan.load(tmp_path / "plan.json").to_json().encode()  # also the order of the keys
    values = json.loads(text)
    assert list(values)[:3] == ["lowvram_plan", "recipe", "card"] and list(values)[-1] == "timeline"
    bare = make_plan(timeline=None, vram_bytes=None, smallest_card=None, settings={})
    assert Plan.from_json(bare.to_json()) == bare != plan


def test_json_holds_few_points() -> None:
    plan = make_plan(timeline=Timeline.of(sawtooth(3000)))
    read = Plan.from_json(plan.to_json())
    assert read.timeline is not None and plan.timeline is not None
    assert len(plan.timeline) > JSON_POINTS >= len(read.timeline) > JSON_POINTS // 2
    assert read.timeline.bytes.sum(axis=0).max() == 3000 * 512
    assert read == replace(plan, timeline=plan.timeline.coarser(JSON_POINTS)) != plan


def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan().save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        make_plan(recipe="other").save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_plan_of_the_version_before_is_read() -> None:
    """It knew nothing of money: usual rates, and no more is said."""
    values = json.loads(make_plan().to_json())
    values["lowvram_plan"] = 2
    for name in ("rates", "published", "costs", "money", "co2_grams"):
        del values[name]
    read = Plan.from_json(json.dumps(values))
    assert read == replace(make_plan(), rates=Rates(), published=(), costs=())
    assert read.money == pytest.approx(58.0 * 0.30)
    values["hours"] = -1
    with pytest.raises(LowVRAMError, match="hours is not a number"):
        Plan.from_json(json.dumps(values))


def test_the_file_tells_the_sums() -> None:
    values = json.loads(make_plan().to_json())
    assert values["money"] == pytest.approx(564 * 0.4 + 58 * 0.1)
    assert values["co2_grams"] == pytest.approx(58 * 50)


HOSTILE: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("lowvram_plan",), 1, "version 1"),
    (("lowvram_plan",), True, "version True"),
    (("recipe",), 5, "recipe is not a text"),
    (("recipe",), "x" * 100_000, "recipe is not a text"),
    (("fits",), 1, "fits is not true or false"),
    (("live_bytes",), -1, "live_bytes is not a whole number"),
    (("live_bytes",), 1.5, "live_bytes is not a whole number"),
    (("live_bytes",), True, "live_bytes is not a whole number"),
    (("live_bytes",), 10**30, "live_bytes is not a whole number"),
    (("device_bytes",), 7, "not the sum"),
    (("vram_bytes",), GIB, "can't fit"),
    (("hours",), float("nan"), "hours is not a number"),
    (("hours",), float("inf"), "hours is not a number"),
    (("hours",), 10**400, "hours is not a number"),
    (("kwh",), "58", "kwh is not a number"),
    (("kwh",), 59.0, "money is not what its hours"),
    (("money",), None, "money is not a number"),
    (("co2_grams",), 1.0, "co2_grams is not what its hours"),
    (("rates",), [], "rates is not an object"),
    (("rates", "per_hour"), -0.4, "rates.per_hour is not a number"),
    (("rates", "per_kwh"), float("nan"), "rates.per_kwh is not a number"),
    (("rates", "currency"), 3, "rates.currency is not a text"),
    (("rates", "tip"), 1.0, "rates.tip is not known"),
    (("published",), "text", "published is not a list"),
    (("costs", 0, "hours"), -1, r"costs\[0\].hours is not a number"),
    (("costs", 0, "needed_bytes"), "1GB", r"costs\[0\].needed_bytes is not a whole"),
    (("costs", 0, "shop"), "x", r"costs\[0\].shop is not known"),
    (("costs",), [{}], r"costs\[0\].*is missing"),
    (("notes",), "text", "notes is not a list"),
    (("notes",), ["x"] * 5000, "notes is not a list"),
    (("notes", 0), None, r"notes\[0\] is not a text"),
    (("settings",), ["a"], "settings is not an object"),
    (("settings", "micro_batch.G"), 8, "settings.micro_batch.G is not a text"),
    (("more",), 1, "more is not known"),
    (("phases", 0), 3, r"phases\[0\] is not an object"),
    (("phases", 0, "by_category", "grads"), 3, "grads"),
    (("phases", 0, "by_category"), {"weights": "3"}, r"phases\[0\].by_category.weights is not a whole"),
    (("phases", 1, "surprise"), 3, r"phases\[1\].surprise is not known"),
    (("policy",), [], "policy is not an object"),
    (("policy", "exec"), "x", "policy.exec is not known"),
    (("policy", "ema"), "moon", "ema=moon is not known"),
    (("policy", "ema"), [], "policy.ema is not a text"),
    (("policy", "phases", "G", "micro_batch"), "8", "policy.phases.G.micro_batch is not a whole"),
    (("policy", "phases", "G", "micro_batch"), 0, "micro_batch=0 is too small"),
    (("policy", "phases", "G"), {}, "policy.phases.G.micro_batch is missing|policy.phases.G.*missing"),
    (("policy", "optimizers", "D", "update"), "after", "collect every gradient"),
    (("timeline", "marks"), [["G", 0]], r"timeline.marks\[0\] is not a name"),
    (("timeline", "marks"), [["G", 5, 100]], "leaves a gap"),
    (("timeline", "marks"), [["G", 0, 99]], "marks end at 99"),
    (("timeline", "reserved"), [1, 2], "reserved of shape"),
    (("timeline", "bytes", "weights"), [1, 2], "equally long lists"),
    (("timeline", "bytes", "weights"), [0.5] * 100, "is not a whole number"),
    (("timeline", "bytes"), {}, "equally long lists"),
    (("timeline", "extra"), 1, "just marks, bytes and reserved"),
    (("alternatives", 0, "images_per_second"), -1, "images_per_second is not a number"),
]


@pytest.mark.parametrize(("place", "value", "said"), HOSTILE)
def test_json_refuses_what_is_wrong(place: tuple[str | int, ...], value: Any, said: str) -> None:
    values = json.loads(make_plan().to_json())
    inner = values
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(LowVRAMError, match=said):
        Plan.from_json(json.dumps(values))


@pytest.mark.parametrize("name", ["recipe", "policy", "phases", "timeline", "device_bytes"])
def test_json_refuses_what_is_missing(name: str) -> None:
    values = json.loads(make_plan().to_json())
    del values[name]
    with pytest.raises(LowVRAMError, match=f"{name} is missing"):
        Plan.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b'{"lowvram_plan": 1', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"lowvram_plan": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[1, 2]", "is not a plan"),
        (b'{"name": "package"}', "is not a plan"),
        (b"\xff\xfe\x00", "is not text"),
        (b" " * (4 * MIB + 1), "larger than 4 MiB"),
    ],
    ids=["empty", "cut short", "deep", "long number", "list", "foreign", "binary", "large"],
)
def test_load_refuses_what_is_no_plan(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(LowVRAMError, match=said):
        Plan.load(tmp_path / "plan.json")


def test_load_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(LowVRAMError, match="is not there"):
            Plan.load(path)


def test_category_names_are_those_of_the_log() -> None:
    assert tuple(make_plan().phases[0].by_category) == CATEGORIES
