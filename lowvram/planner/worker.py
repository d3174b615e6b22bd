"""A recipe's plan, made in a process of its own.

A trace changes how torch behaves for a while (fake tensors, autocast), which a training's threads must not see; and a
process that uses CUDA can't be forked, as the tracer's helpers are.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from lowvram.config import settings_from, settings_values
from lowvram.errors import LowVRAMError
from lowvram.planner.cards import Card
from lowvram.planner.plan import Plan
from lowvram.settings import Settings

_FAILED = 4  # the exit status of an error that is the user's to mend, which follows as JSON


def plan_apart(settings: Settings, card: Card, budget_bytes: int, *, allow: Collection[str] = ()) -> Plan:
    """`recipe.plan_recipe` for a card and a budget, in another process.

    Raises:
        LowVRAMError: as there, or the other process failed.
    """
    asked = {
        "settings": {**settings_values(settings), "overrides": settings.overrides},
        "card": {**asdict(card), "capability": list(card.capability)},
        "budget_bytes": budget_bytes,
        "allow": list(allow),
    }
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lowvram.planner.worker"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == _FAILED:
        raise LowVRAMError(*json.loads(done.stdout.splitlines()[-1]))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LowVRAMError(f"the planner failed: {last}", "Train without a plan: memory=recipe.")
    return Plan.from_json(done.stdout[done.stdout.index("{") :], source="the planner's answer")


def _answer(asked: dict[str, Any]) -> Plan:
    from lowvram.planner import make
    from lowvram.planner.recipe import plan_recipe

    card = Card(**{**asked["card"], "capability": tuple(asked["card"]["capability"])})
    where = make.place(asked["budget_bytes"], card)
    return plan_recipe(settings_from(asked["settings"]), where=where, allow=asked["allow"])


def main() -> None:
    """Read what is asked from the standard input, and write the plan's JSON."""
    try:
        plan = _answer(json.loads(sys.stdin.read()))
    except LowVRAMError as error:
        print(json.dumps([error.problem, error.remedy]))
        sys.exit(_FAILED)
    print(plan.to_json())


if __name__ == "__main__":
    main()
