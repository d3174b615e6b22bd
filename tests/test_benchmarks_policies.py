"""The benchmark of policies on a tiny recipe: what it counts, and that traced and real counts are one."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import policies, policy_sets, record, workloads
from benchmarks.memory_prediction import Predictor
from lowvram import load_recipe
from lowvram.errors import LowVRAMError
from lowvram.planner import cards

SMALL_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
}


@pytest.mark.slow
def test_traced_is_what_is_counted_on_real_tensors_and_savings_show():
    settings = [*TINY, "augment.p=1", "out=unused", "precision=fp32"]
    only = ["plain", "recompute", "offload R1 and path length"]
    real = policies.compare(policies.builders("faces32", settings, only[:1]), steps=1, rounds=1, traced=False)
    built = policies.builders("faces32", settings, only)
    traced = policies.compare(built, steps=1, rounds=1, traced=True)
    plain, recomputed, offloaded = (traced["policies"][name] for name in only)
    measured = real["policies"]["plain"]
    assert measured["peak_bytes"] == pytest.approx(plain["peak_bytes"], rel=0.1)  # memory formats are a GPU's
    assert measured["seconds_per_step"] > 0 and "seconds_per_step" not in plain
    assert plain["host_bytes"] == 0 < offloaded["host_bytes"]
    assert plain["flops_per_step"] < recomputed["flops_per_step"]
    assert plain["peak_bytes"] <= plain["reserved_bytes"] and sum(plain["peak_holders"].values()) == plain["peak_bytes"]
    assert plain["peak_phase"] in plain["phases"] and " in " in plain["peak_at"]
    assert offloaded["phases"]["R1"]["peak_bytes"] < plain["phases"]["R1"]["peak_bytes"]
    for result in (real, traced):
        assert "plain" in policies.table({"workload": "tiny", **result})
        points = policies.points(result, "faces32", [*settings], 8)
        assert points[0]["memory"]["allocated_bytes"] == result["policies"]["plain"]["peak_bytes"]
        json.dumps(points)


@pytest.mark.slow
def test_an_average_on_the_host_is_not_counted():
    only = ["plain", "average on the host"]
    built = policies.builders("faces32", [*TINY, "out=unused"], only)
    plain, moved = (policies.trace(build)["resident_bytes"] for build in built.values())
    assert moved < plain


@pytest.mark.slow
def test_a_whole_trace_is_what_the_planner_puts_together():
    only = ["half micro-batches", "fused G"]
    settings = [*TINY, "augment.p=1", "out=unused", "memory.policy=recipe"]
    sets = policy_sets.stylegan2(load_recipe("faces32", settings))
    predictor = Predictor(load_recipe("faces32", settings), cards.find("RTX 3060"))
    for name, build in policies.builders("faces32", settings, only).items():
        predicted = predictor.predict(load_recipe("faces32", [*settings, *sets[name]]))
        traced = policies.trace(build)
        for part, found in traced["phases"].items():
            assert predicted.live_bytes[part] == pytest.approx(found["peak_bytes"], rel=0.001), (name, part)
    predictor.close()


@pytest.mark.slow
def test_the_unet_runs_traced_and_streaming_saves_its_weights() -> None:
    pytest.importorskip("diffusers")
    peaks = []
    for name in ("resident", "streamed"):
        policy = policy_sets.sd15(2)[name]
        build = functools.partial(workloads.sd15, batch=2, **policy, **SMALL_UNET)
        peaks.append(policies.trace(build)["phases"]["denoise"]["peak_bytes"])
    assert 0 < peaks[1] < peaks[0]


def test_the_unet_is_of_the_size_of_stable_diffusion():
    diffusers = pytest.importorskip("diffusers")
    with FakeTensorMode():
        network = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert sum(p.numel() for p in network.parameters()) == 859_520_964


def test_sets_respect_the_groups_of_the_discriminator():
    for recipe, batch in (("faces256", 16), ("faces1024", 4)):
        settings = load_recipe(recipe, [f"batch={batch}", "out=unused"])
        sets = policy_sets.stylegan2(settings)
        for name in ("half micro-batches", "leaner", "leanest"):
            load_recipe(recipe, [f"batch={batch}", "out=unused", *sets[name]])
    with pytest.raises(LowVRAMError, match="not known"):
        policy_sets.pick({"plain": 1}, ["plane"])


@pytest.mark.slow
def test_the_command_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    words = ["recipe=faces32", *TINY, "--only", "plain,lean", "--steps", "1", "--rounds", "1", "--json", str(out)]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.policies", *words], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    points = record.read(out)["points"]
    assert [(point["benchmark"], point["name"]) for point in points] == [("policies", "plain"), ("policies", "lean")]
    for point in points:
        assert point["seconds"]["G"]["n"] == 1 and point["memory"]["allocated_bytes"] > 0
        assert point["images_per_second"] == pytest.approx(8 / point["seconds_per_step"]["median"])
    assert "plain" in done.stdout
