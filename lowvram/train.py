"""`python -m lowvram.train recipe=NAME [setting=value ...]`: train, with Hydra's overrides and --multirun."""

import os
import sys

from lowvram import config, launch
from lowvram.errors import LowVRAMError
from lowvram.settings import Settings

_STOPPED = 130  # as shells say of what Ctrl-C ended
_HYDRA_FLAGS = ("--multirun", "-m", "--resolve", "--hydra-help", "--version")
_HYDRA_FLAGS_WITH_VALUE = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--info",
    "-i",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
)


def main() -> None:
    """Entry of the command."""
    arguments = sys.argv[1:]
    if any(a in ("-h", "--help") for a in arguments):
        print(config.train_help())
        return
    launch.prefer_huge_pages()
    launch.start_missing_processes()
    try:
        config.report_errors(lambda: _hydra(arguments), arguments)
    except KeyboardInterrupt:
        if "debug=true" in arguments:
            raise
        print("lowvram: stopped", file=sys.stderr)
        sys.exit(_STOPPED)


def _hydra(arguments: list[str]) -> None:
    import hydra
    from omegaconf import DictConfig

    flags = [a for a in arguments if a.split("=")[0] in _HYDRA_FLAGS + _HYDRA_FLAGS_WITH_VALUE]
    words = [a for a in arguments if a not in flags and not _is_flag_value(a, arguments)]
    words = config.parse_assignments(config.short_forms(words))
    of_run = not any(w.startswith("recipe=") for w in words)
    if of_run:
        arguments = [f"recipe={_recipe_of_run(words)}", *arguments]
        sys.argv[1:] = config.short_forms(arguments)
    else:
        sys.argv[1:] = config.register_recipe_files(config.short_forms(arguments))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised to us, and worded by config.friendly_errors

    @hydra.main(config_path="pkg://lowvram.conf", config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> None:
        try:
            _train(_settings_of_job(composed, words, of_run=of_run))
        except LowVRAMError as error:  # Hydra would print a line of its own, and end the other jobs of a sweep
            failures.append(error)

    failures: list[LowVRAMError] = []
    with config.friendly_errors():
        job()
    if failures:
        raise failures[0]


def _recipe_of_run(words: list[str]) -> str:
    """The name for Hydra of the recipe of the run that `resume` names: a run's folder knows its recipe."""
    from lowvram.resume import INVOCATION, named_run

    typed = {name: value.strip("'\"") for name, _, value in (word.partition("=") for word in words)}
    run = named_run(typed)
    if run is None:
        raise LowVRAMError(
            "No recipe was given.",
            f"Add recipe=NAME: {', '.join(config.recipe_names())}. Or go on with a run: resume=FOLDER.",
        )
    return config.register_settings(run.settings, without=INVOCATION)


def _settings_of_job(composed: "config.DictConfig", words: list[str], *, of_run: bool) -> Settings:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = config.to_settings(composed, words, of_run=of_run)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and settings.out is not None:
        settings.out = os.path.join(settings.out, str(hydra_config.job.num))  # noqa: PTH118 - kept as text
    return settings


def _train(settings: Settings) -> None:
    from lowvram.trainer import Trainer

    try:
        Trainer(settings).fit()
    except KeyboardInterrupt as stop:  # of a run that this one stands on, which has been saved
        if not stop.args:
            raise
        print(f"lowvram: {stop}")


def _is_flag_value(argument: str, arguments: list[str]) -> bool:
    """Whether a word belongs to the Hydra flag before it, such as `job` in `--cfg job`."""
    index = arguments.index(argument)
    return index > 0 and arguments[index - 1] in _HYDRA_FLAGS_WITH_VALUE and "=" not in argument


if __name__ == "__main__":
    main()
