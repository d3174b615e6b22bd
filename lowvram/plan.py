"""`python -m lowvram.plan recipe=NAME vram=6GB [setting=value ...]`: does it fit, how, at what cost. Needs no GPU."""

import os
import sys
from pathlib import Path

from lowvram import config
from lowvram.errors import LowVRAMError

_OWN = {
    "card": "a card by name (card=3060); else the one that is there, else a usual one of the budget's size",
    "allow": "what may be changed of the training: adam8bit, fd_r1, pl_shrink (allow=[fd_r1,pl_shrink])",
    "processes": "that train together, each on such a card (accelerate launch --num_processes N); 1 unless given",
    "out": "the folder for plan.json and plan.png; plans/RECIPE-VRAM unless given",
}
NOTHING_FITS = 3
_MOST_PROCESSES = 64


def main() -> None:
    """Entry of the command: exits with 0 when the recipe fits, 3 when nothing does, 2 on a mistake."""
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(_help())
        return
    fits: list[bool] = []
    config.report_errors(lambda: fits.append(_plan(arguments)), arguments)
    sys.exit(0 if fits[0] else NOTHING_FITS)


def _plan(arguments: list[str]) -> bool:
    words = config.parse_assignments(arguments)
    own = {w.split("=", 1)[0]: w.split("=", 1)[1] for w in words if w.split("=")[0] in _OWN}
    recipe = next((w.removeprefix("recipe=") for w in words if w.startswith("recipe=")), None)
    if recipe is None:
        raise LowVRAMError("No recipe was given.", f"Add recipe=NAME: {', '.join(config.recipe_names())}.")
    rest = [w for w in words if w.split("=")[0] not in _OWN and not w.startswith("recipe=")]
    settings = config.load_recipe(recipe, rest)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed; threads would only wait for one another
    from lowvram.planner import picture
    from lowvram.planner.recipe import plan_recipe

    allow = [name for name in own.get("allow", "").strip("[]").replace(" ", "").split(",") if name]
    plan = plan_recipe(settings, card=own.get("card"), allow=allow, processes=_processes(own.get("processes", "1")))
    print(plan)
    folder = Path(own.get("out") or Path("plans") / f"{settings.recipe}-{settings.vram or plan.card.replace(' ', '')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plan.json")
        picture.draw(plan, folder / "plan.png")
    except OSError as error:
        raise LowVRAMError(
            f"the plan can't be written to {folder}: {error}.", "Give another folder: out=PATH."
        ) from error
    print(f"plan.json and plan.png are in {folder}")
    return plan.fits


def _processes(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= _MOST_PROCESSES:
        raise LowVRAMError(f"processes={word} is not a number from 1 to {_MOST_PROCESSES}.", "Write processes=2.")
    return int(word)


def _help() -> str:
    own = "\n".join(f"  {name + '=':<11} {about}" for name, about in _OWN.items())
    return f"""python -m lowvram.plan recipe=NAME vram=6GB [setting=value ...]

Say whether a recipe fits a card, how, at what cost in speed, and what the smallest card is that would do. Needs no GPU.
Settings are those of lowvram.train; memory.* and micro_batch.* that are given stay as they are.

{own}

Exits with 0 when it fits, with 3 when nothing does, with 2 on a mistake.

Examples:
  python -m lowvram.plan recipe=faces256 vram=6GB
  python -m lowvram.plan recipe=faces1024 card=3060 memory.activations.G=recompute
  python -m lowvram.plan recipe=faces256 vram=6GB memory.fsdp=shard processes=2"""


if __name__ == "__main__":
    main()
