"""From a recipe's name or file, and overrides, to typed settings; and the entry of every command.

Hydra composes (conf/), OmegaConf holds the types (lowvram.settings). What users type wrong ends as a LowVRAMError.
"""

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from lowvram.errors import LowVRAMError
from lowvram.settings import BY_TASK, Settings, flatten, nearest, settings_class

_CONF = Path(__file__).parent / "conf"
_Options = TypeVar("_Options")
# Settings that hold text, commas and all.
_WORDS = (
    *("text.prompt", "text.prefix", "text.suffix", "prior.prompt"),
    *("embedding.token", "embedding.initial", "sampling.negative", "price", "electricity", "carbon", "contributor"),
)
_PATHS = (
    *("weights", "out", "resume", "data.path", "data.masks", "latent.path", "latent.folder", "prior.folder"),
    *("projection.backbone_weights", "lora.begin", "lora.stack", "embedding.templates", "mark.certificate", "mark.key"),
)


def recipe_names() -> list[str]:
    """The built-in recipes, smallest resolution first, then those that fine-tune."""
    return sorted(
        (p.stem for p in (_CONF / "recipe").glob("*.yaml")),
        key=lambda n: (n.startswith("sd"), int(re.sub(r"\D", "", n) or 10**6), n),
    )


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Settings:
    """Settings of a recipe.

    Args:
        recipe: a built-in name such as "faces256", or the path of a .yaml file.
        overrides: as on the command line, such as ["vram=6GB", "data.path=ffhq.zip"].

    Raises:
        LowVRAMError: the recipe, a setting or a value is not known, or settings contradict each other.
    """
    overrides = short_forms(list(overrides or []))
    arguments = register_recipe_files([f"recipe={recipe}", *overrides])
    with friendly_errors(), _beside_hydra(), initialize_config_module("lowvram.conf", version_base="1.3"):
        composed = compose("config", overrides=arguments)
    return to_settings(composed, overrides)


@contextmanager
def _beside_hydra() -> Iterator[None]:
    """Within, a recipe can be composed though Hydra may be running the command that named another."""
    instance = GlobalHydra.instance()
    running = instance.hydra
    instance.clear()
    try:
        yield
    finally:
        instance.hydra = running


def to_settings(composed: DictConfig, overrides: list[str], *, of_run: bool = False) -> Settings:
    """A composed Hydra configuration as checked settings; `overrides` are those that the user typed.

    of_run: the recipe is a run's own, which has the shape of its weights already.
    """
    with friendly_errors():
        values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    plain: dict[str, Any] = {str(key): value for key, value in values.items() if key != "hydra"}
    names = [o.lstrip("+~").split("=")[0] for o in overrides]
    plain["overrides"] = [n for n in names if n != "recipe" and not n.startswith("hydra.")]
    settings = settings_from(plain)
    if settings.weights is None or (of_run and "weights" not in settings.overrides):
        return settings
    from lowvram.tasks import task_class  # with torch, which no command needs that only looks at settings

    return task_class(settings).with_shape_of_weights(settings)


def settings_from(values: dict[str, Any]) -> Settings:
    """Nested plain values as checked settings (the inverse of `settings_values`)."""
    with friendly_errors():
        type_ = settings_class(values.get("task", "stylegan2"))
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(type_), _literal(values)))
    assert isinstance(typed, Settings)
    return typed


def _literal(value: Any) -> Any:
    """Values whose texts mean what they say: ${oc.env:NAME} in somebody's run must not read this machine's."""
    if isinstance(value, dict):
        return {name: _literal(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", value)
    return value


def settings_values(settings: Settings) -> dict[str, Any]:
    """Settings as nested plain values, without what is only of this invocation."""
    values = dataclasses.asdict(settings)
    del values["overrides"]
    return values


def short_forms(arguments: list[str]) -> list[str]:
    """What users type as Hydra reads it: memory=POLICY is memory.policy=POLICY; words and paths have quotes.

    grid=400g/kWh is carbon=400g/kWh, for a grid of samples has a number.
    """

    def whole(argument: str) -> str:
        if argument.startswith("memory="):
            return f"memory.policy={argument.removeprefix('memory=')}"
        if argument.startswith("grid=") and argument.lower().endswith("/kwh"):
            return f"carbon={argument.removeprefix('grid=')}"
        return argument

    return [_quoted(whole(argument)) for argument in arguments]


def _quoted(argument: str) -> str:
    """`text.prompt=a photo of <me>, smiling` with quotes round the value, which the shell took and Hydra needs.

    A value that begins with one has them. Of paths, those that Hydra can read are left as they are: they may be
    several, for a sweep.
    """
    name, equals, value = argument.partition("=")
    bare = name.lstrip("+")
    if not equals or not value or value[0] in "'\"" or value == "null":
        return argument
    if bare in _WORDS or (bare in _PATHS and not all(map(_is_plain_path, value.split(",")))):
        escaped = value.replace("\\", "\\\\") if value.endswith("\\") else value
        return name + '="' + escaped.replace('"', '\\"') + '"'
    return argument


def _is_plain_path(text: str) -> bool:
    """Whether Hydra takes a text as it is: in ASCII, and neither a number nor a word that it knows."""
    known = re.fullmatch(r"[+-]?[\d_.]+(e[+-]?\d+)?|[+-]?inf|nan|true|false|null", text, re.IGNORECASE)
    return not known and re.fullmatch(r"[\w/\-\\+.$%*@:?|~ ]*", text, re.ASCII) is not None


def register_recipe_files(arguments: list[str]) -> list[str]:
    """Replace each `recipe=PATH.yaml` by a name that Hydra can find, and refuse unknown recipes.

    A file without a `defaults:` list stands on the task that it names, or stylegan2.
    """
    out = []
    for argument in arguments:
        if not argument.startswith("recipe="):
            out.append(argument)
            continue
        choices = [_register_recipe(choice) for choice in argument.removeprefix("recipe=").split(",")]
        out.append("recipe=" + ",".join(choices))
    return out


def _register_recipe(choice: str) -> str:
    if choice in recipe_names():
        return choice
    path = Path(choice).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise LowVRAMError(
            f"recipe={choice} is not known.",
            nearest(choice, recipe_names()) + " A file of your own is named with its ending: recipe=./mine.yaml.",
        )
    try:
        node = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise LowVRAMError(f"recipe={choice} can't be read: {error}", "Give the path of a YAML file.") from error
    if not isinstance(node, DictConfig):
        raise LowVRAMError(f"recipe={choice} holds no settings.", "Write them as `name: value` lines.")
    if "hydra" in node:  # which would name functions to be called: a recipe may be somebody else's
        raise LowVRAMError(f"recipe={choice} sets hydra.", "A recipe holds settings; give Hydra's on the command line.")
    task = node.get("task") or "stylegan2"
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    plain = {str(name): value for name, value in values.items()}
    defaults = plain.pop("defaults", [{"/task": task}, "_self_"])
    name = f"file_{path.stem}_{abs(hash(str(path.resolve()))):x}"
    _store_recipe(name, {"defaults": defaults, **plain, "recipe": path.stem})
    return name


def register_settings(settings: Settings, *, without: tuple[str, ...]) -> str:
    """A name by which Hydra finds these settings as a recipe; `without` are left as they usually are."""
    values = {name: _literal(value) for name, value in settings_values(settings).items() if name not in without}
    name = "of_a_run"
    _store_recipe(name, {"defaults": [{"/task": settings.task}, "_self_"], **values, "recipe": settings.recipe})
    return name


def _store_recipe(name: str, node: dict[str, Any]) -> None:
    ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into ours: the setting, its value, what to do."""
    try:
        yield
    except ConfigKeyError as error:
        raise _unknown_setting(str(error.full_key or error.key)) from error
    except MissingMandatoryValue as error:
        raise LowVRAMError(f"{str(error).splitlines()[0]}.", "Give it a value: name=value.") from error
    except ValidationError as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise LowVRAMError(f"{error.full_key}: {first}.", "Give a value of that type.") from error
    except HydraException as error:
        text = " ".join(str(error).split())
        unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
        if unknown:
            raise _unknown_setting(unknown[1]) from error
        if ("recipe" in text and "???" in text) or "must specify 'recipe'" in text:
            raise LowVRAMError("No recipe was given.", f"Add recipe=NAME: {', '.join(recipe_names())}.") from error
        raise LowVRAMError(text.split(" Available options")[0], "See --help for the settings.") from error
    except OmegaConfBaseException as error:
        raise LowVRAMError(str(error).splitlines()[0], "See --help for the settings.") from error


def setting_names() -> list[str]:
    """Every setting in dotted form."""

    def names(type_: type, prefix: str = "") -> Iterator[str]:
        for item in dataclasses.fields(type_):
            if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
                yield from names(item.type, f"{prefix}{item.name}.")
            elif item.name != "overrides":
                yield prefix + item.name

    return list(dict.fromkeys(name for type_ in BY_TASK.values() for name in names(type_)))


def _unknown_setting(name: str) -> LowVRAMError:
    known = setting_names()
    close = nearest(name, known)
    if close.startswith("Known"):
        by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
        close = f"Did you mean {' or '.join(by_leaf)}?" if by_leaf else "--help lists the settings."
    return LowVRAMError(f"There is no setting {name}.", close)


def differences(saved: Settings, given: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as {name: (saved, given)}."""
    a, b = flatten(settings_values(saved)), flatten(settings_values(given))
    return {name: (a.get(name), b.get(name)) for name in sorted(a | b) if a.get(name) != b.get(name)}


def parse_assignments(arguments: list[str]) -> list[str]:
    """Check the grammar of Hydra overrides, so that `batch 8` or `--batch=8` is named in an error."""
    for argument in arguments:
        if argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            raise LowVRAMError(f"{argument} is not understood.", "Settings are given as name=value; --help lists them.")
    with friendly_errors():
        OverridesParser.create().parse_overrides(arguments)
    return arguments


def report_errors(run: Callable[[], None], arguments: list[str]) -> None:
    """Call `run`; print a LowVRAMError in two lines and exit with 2, unless `debug=true` is among the arguments."""
    try:
        run()
    except LowVRAMError as error:
        if "debug=true" in [a.lower() for a in arguments]:
            raise
        print(f"lowvram: {error}", file=sys.stderr)
        sys.exit(2)


def command(options_type: type[_Options], main: Callable[[_Options], None], name: str) -> None:
    """Entry of a command whose options are the fields of a dataclass: `key=value` words, `--help`, clear errors.

    A field's `metadata={"help": "..."}` is its line in --help. Fields without a default must be given.
    name: the module, with its package where that is not lowvram.
    """
    arguments = sys.argv[1:]

    def run() -> None:
        if any(a in ("-h", "--help", "help") for a in arguments):
            print(_options_help(options_type, name))
            return
        words = [a for a in arguments if not a.lower().startswith("debug=")]
        main(_parse_options(options_type, words))

    report_errors(run, arguments)


def _parse_options(options_type: type[_Options], words: list[str]) -> _Options:
    fields = {f.name: f for f in dataclasses.fields(options_type)}  # type: ignore[arg-type]
    for word in words:
        key = word.split("=")[0]
        if "=" not in word or word.startswith("-"):
            raise LowVRAMError(f"{word} is not understood.", "Options are given as name=value; --help lists them.")
        if key not in fields:
            raise LowVRAMError(f"There is no option {key}.", nearest(key, list(fields)))
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and not any(w.startswith(f"{field.name}=") for w in words):
            raise LowVRAMError(f"{field.name} is missing.", f"Add {field.name}=VALUE.")
    with friendly_errors():
        given = OmegaConf.create(dict(_option_value(fields[word.split("=")[0]], word) for word in words))
        merged = OmegaConf.merge(OmegaConf.structured(options_type), given)
        options = OmegaConf.to_object(merged)
    assert isinstance(options, options_type)
    return options


def _option_value(field: "dataclasses.Field[Any]", word: str) -> tuple[str, Any]:
    """An option's name and value. Texts are taken as they are, for a prompt may hold anything; lists are "a,b" here."""
    name, value = word.split("=", 1)
    value = re.sub(r"^\[(.*)\]$", r"\1", value)
    if "str" in str(field.type):
        return name, None if value == "null" and "None" in str(field.type) else value
    return name, OmegaConf.from_dotlist([f"{name}={value}"])[name]


def _options_help(options_type: type, name: str) -> str:
    summary = inspect.cleandoc(options_type.__doc__ or "")
    lines = [f"python -m {name if '.' in name else f'lowvram.{name}'} option=value ...", "", summary, ""]
    for field in dataclasses.fields(options_type):
        has_default = field.default is not dataclasses.MISSING
        default = json.dumps(field.default).strip('"') if has_default else "..."
        lines.append(f"  {field.name + '=' + default:<24} {field.metadata.get('help', '')}")
    return "\n".join(lines)


def train_help() -> str:
    """The text of `python -m lowvram.train --help`, from the comments in conf/."""
    recipes, width = [], max(len(name) for name in recipe_names())
    for name in recipe_names():
        lines = (_CONF / "recipe" / f"{name}.yaml").read_text().splitlines()
        about = next(line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)
        recipes.append(f"  {name:<{width}} {about}")
    return f"""python -m lowvram.train recipe=NAME [setting=value ...]

Train an image generator on the card you own.

Recipes (recipe=NAME, or recipe=./your.yaml):
{chr(10).join(recipes)}

Settings, with their usual values (a recipe changes some; --cfg job prints what holds):
{chr(10).join(_commented_settings())}

Examples:
  python -m lowvram.train recipe=faces32
  python -m lowvram.train recipe=faces256 data.path=ffhq.zip vram=6GB
  python -m lowvram.train recipe=./mine.yaml batch=8 resume=auto
  python -m lowvram.train recipe=faces64 seed=0,1,2 --multirun
  python -m lowvram.train recipe=faces64 --cfg job"""


def _commented_settings() -> Iterator[str]:
    yield from _commented(_CONF / "config.yaml")
    for task in BY_TASK:
        yield ""
        yield f"task={task} has also:"
        yield from _commented(_CONF / "task" / f"{task}.yaml")


def _commented(path: Path) -> Iterator[str]:
    """The settings of a file, dotted, each with its value and its comment; a group's comment on a line of its own."""
    groups: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("hydra:"):
            break
        match = re.match(r"( *)(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        if not match or match[2] in ("defaults", "task"):
            continue
        del groups[len(match[1]) // 2 :]
        name = ".".join([*groups, match[2]])
        if match[3]:
            setting = f"{name}={match[3].replace('???', '...')}"
            yield f"  {setting:<36} {match[4] or ''}".rstrip()
            continue
        groups.append(match[2])
        if match[4]:
            yield f"  {name + '.':<36} {match[4]}"
