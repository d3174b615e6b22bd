"""Memory on the page: the plan's numbers beside those measured, over the step and by phase."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "planner"))
import numpy as np
from example_plans import a_phase, a_plan
from example_runs import Page, run_folder

from lowvram import pages
from lowvram.pages import folder as folders
from lowvram.pages.memory import memory
from lowvram.pages.words import gigabytes
from lowvram.planner.plan import Timeline

_KINDS = ("allocated", "reserved")


def test_prediction_and_measurement_stand_beside_each_other(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    marks = (("G", 0, 20), ("D", 20, 40))
    timeline = Timeline(marks=marks, bytes=np.arange(240, dtype=np.int64).reshape(6, 40) * 2**22)
    phases = a_phase("G", 2 * 2**30), a_phase("D", 3 * 2**30)
    plan = a_plan(*phases, live_bytes=3 * 2**30, reserved_bytes=4 * 2**30, timeline=timeline)
    plan.save(run / "plan.json")
    page = Page(pages.write(run))
    text = page.text()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert f"{gigabytes(plan.device_bytes)} on the card" in text
    for phase in plan.phases:
        row = next(r for r in page.all("tr") if page.text(r).startswith(f"{phase.name} {gigabytes(phase.live_bytes)}"))
        measured = [max(json.loads(line)[f"peak_{kind}_bytes/{phase.name}"] for line in lines) for kind in _KINDS]
        assert page.text(row).startswith(" ".join([phase.name, *map(gigabytes, [phase.live_bytes, *measured])]))
    found = memory(folders.read(run))
    assert found.step is not None and plan.timeline is not None
    assert len(found.step.areas) == 6 and found.step.measured.count("M") >= 1
    assert all(0 <= at <= 100 for at, _ in found.step.spans)
