"""`python -m lowvram.plan recipe=NAME vram=6GB [setting=value ...]`: does it fit, how, at what cost. Needs no GPU."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram import config
from lowvram.errors import LowVRAMError

if TYPE_CHECKING:
    from lowvram.planner.plan import Plan
    from lowvram.planner.recipe import Costs
    from lowvram.settings import Settings

_OWN = {
    "card": "a card by name (card=3060); else the one that is there, else a usual one of the budget's size",
    "allow": "what may be changed of the training: adam8bit, fd_r1, pl_shrink (allow=[fd_r1,pl_shrink])",
    "processes": "that train together, each on such a card (accelerate launch --num_processes N); 1 unless given",
    "costs": "true: the table of other cards with each planned for by itself, a third longer; false: no such table",
    "proposal": "true: with costs, and proposal.md, one page that asks for compute; needs a plan of smaller images too",
    "aim": 'what the training is for, in your words, for the proposal (aim="...")',
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
    own = {a.split("=", 1)[0]: a.split("=", 1)[1] for a in arguments if "=" in a and a.split("=")[0] in _OWN}
    # Words of our own may hold anything (an aim is a sentence); the rest is Hydra's.
    words = config.parse_assignments(config.short_forms([a for a in arguments if a.split("=")[0] not in own]))
    recipe = next((w.removeprefix("recipe=") for w in words if w.startswith("recipe=")), None)
    if recipe is None:
        raise LowVRAMError("No recipe was given.", f"Add recipe=NAME: {', '.join(config.recipe_names())}.")
    settings = config.load_recipe(recipe, [w for w in words if not w.startswith("recipe=")])
    proposed = _flag("proposal", own)
    costs = _costs(own, proposed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # nothing is computed; threads would only wait for one another
    from lowvram.planner import picture, proposal
    from lowvram.planner.recipe import plan_recipe

    allow = [name for name in own.get("allow", "").strip("[]").replace(" ", "").split(",") if name]
    processes = _processes(own.get("processes", "1"))
    proposal.check_aim(own.get("aim", ""))
    plan = plan_recipe(settings, card=own.get("card"), allow=allow, processes=processes, costs=costs)
    print(plan)
    page = None
    if proposed and plan.fits:
        smaller = _smaller(settings, plan.card, processes)
        page = proposal.text(plan, settings, aim=own.get("aim", ""), data=proposal.of_data(settings), smaller=smaller)
    folder = Path(own.get("out") or Path("plans") / f"{settings.recipe}-{settings.vram or plan.card.replace(' ', '')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plan.json")
        picture.draw(plan, folder / "plan.png")
        if page is not None:
            (folder / "proposal.md").write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise LowVRAMError(
            f"the plan can't be written to {folder}: {error}.", "Give another folder: out=PATH."
        ) from error
    print(f"plan.json and plan.png are in {folder}" + (", and proposal.md" if page else ""))
    if proposed and page is None:
        print("There is no proposal, for the recipe does not fit: plan for a card of the table above, card=NAME.")
    return plan.fits


def _smaller(settings: "Settings", card: str, processes: int) -> "Plan | None":
    """The plan of the recipe of the next smaller images, as far as there is one: faces128 beside faces256.

    On the same card and budget, at the same rates.
    """
    from lowvram.planner.recipe import plan_recipe

    name = settings.recipe.replace(str(settings.resolution), str(settings.resolution // 2))
    if name == settings.recipe or name not in config.recipe_names():
        return None
    given = {key: getattr(settings, key) for key in ("vram", "price", "electricity", "carbon")}
    given |= {key: getattr(settings, key) for key in ("kimg", "batch") if key in settings.overrides}
    words = config.short_forms([f"{key}={value}" for key, value in given.items() if value is not None])
    return plan_recipe(config.load_recipe(name, words), card=card, processes=processes)


def _costs(own: dict[str, str], proposed: bool) -> "Costs":
    """How closely other cards are looked at."""
    if proposed or _flag("costs", own):
        return "each"
    return "none" if "costs" in own else "quick"


def _flag(name: str, own: dict[str, str]) -> bool:
    word = own.get(name, "false").lower()
    if word not in ("true", "false"):
        raise LowVRAMError(f"{name}={own[name]} is neither true nor false.", f"Write {name}=true, or leave it out.")
    return word == "true"


def _processes(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= _MOST_PROCESSES:
        raise LowVRAMError(f"processes={word} is not a number from 1 to {_MOST_PROCESSES}.", "Write processes=2.")
    return int(word)


def _help() -> str:
    own = "\n".join(f"  {name + '=':<11} {about}" for name, about in _OWN.items())
    return f"""python -m lowvram.plan recipe=NAME vram=6GB [setting=value ...]

Say whether a recipe fits a card, how, at what cost in speed, and what the smallest card is that would do. Needs no GPU.
Settings are those of lowvram.train; memory.* and micro_batch.* that are given stay as they are. What it costs is
told at price=0.40/h (of the card that is asked for), electricity=0.30/kWh and grid=400g/kWh of CO2.

{own}

Exits with 0 when it fits, with 3 when nothing does, with 2 on a mistake.

Examples:
  python -m lowvram.plan recipe=faces256 vram=6GB
  python -m lowvram.plan recipe=faces1024 card=3060 memory.activations.G=recompute
  python -m lowvram.plan recipe=faces256 vram=6GB memory.fsdp=shard processes=2
  python -m lowvram.plan recipe=faces256 card=3060 price=0.40/h costs=true
  python -m lowvram.plan recipe=faces256 card=3060 proposal=true aim='Faces for a game'"""


if __name__ == "__main__":
    main()
