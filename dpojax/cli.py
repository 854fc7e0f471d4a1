"""The `dpojax` command: parsing and calls, nothing else."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from dpojax.command_config import (
    BenchConfig,
    CompletionConfig,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    InitConfig,
    LossesConfig,
    PlanConfig,
    ReferenceConfig,
    ReportConfig,
    ScoreConfig,
    SweepConfig,
    WatchConfig,
)
from dpojax.config import TrainConfig
from dpojax.config_source import as_source
from dpojax.flag_groups import make_registry
from dpojax.shell_completion import as_script
from dpojax.user_code import load_names

_PACKAGE = str(Path(__file__).parent)
_ORIGIN_FLAGS = ("--from-trl", "--trl-trainer", "--trl-processes", "--print-config")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 2 for what the user can mend, with one sentence."""
    # Before transformers is imported: it would say that it misses PyTorch, which dpojax
    # does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Orbax and the clients of a bucket log what they raise too, with tracebacks.
    for name in ("absl", "fsspec", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable
    try:
        _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, FloatingPointError, OSError) as error:
        if not isinstance(error, OSError) and not _is_ours(error):
            raise
        sentence = " ".join(str(error).splitlines())
        print(f"dpojax: error{_where()}: {sentence}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: list[str]) -> tuple[Any, bool]:
    """The settings of a command, and whether they are only to be printed."""
    train, print_config = TrainConfig(), False
    if arguments[:1] in (["train"], ["reference"], ["plan"], ["sweep"]):
        train, arguments, print_config = _take_origin(arguments)
    return _make_cli(train)(args=arguments), print_config


def _make_cli(train: TrainConfig) -> Callable[..., Any]:
    """The parser of all commands, those of training with these defaults."""
    ahead = ReferenceConfig(**vars(train))
    planned = PlanConfig(**vars(train))
    swept = SweepConfig(**vars(train))
    commands = (
        Annotated[TrainConfig, tyro.conf.subcommand("train", default=train)]
        | Annotated[ReferenceConfig, tyro.conf.subcommand("reference", default=ahead)]
        | Annotated[PlanConfig, tyro.conf.subcommand("plan", default=planned)]
        | Annotated[SweepConfig, tyro.conf.subcommand("sweep", default=swept)]
        | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[LossesConfig, tyro.conf.subcommand("losses")]
        | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
        | Annotated[InitConfig, tyro.conf.subcommand("init")]
        | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
        | Annotated[ExportConfig, tyro.conf.subcommand("export")]
        | Annotated[ReportConfig, tyro.conf.subcommand("report")]
        | Annotated[WatchConfig, tyro.conf.subcommand("watch")]
        | Annotated[CompletionConfig, tyro.conf.subcommand("completion")]
    )
    return partial(
        tyro.cli,
        commands,
        prog="dpojax",
        description="Preference optimisation of causal language models in JAX.",
        registry=make_registry(),
    )


def _dispatch(arguments: list[str]) -> None:
    config, print_config = parse(arguments)
    if isinstance(config, ReportConfig | WatchConfig):
        _show(config)
        return
    if isinstance(config, CompletionConfig):
        _complete(config)
        return
    if print_config:
        print(as_source(config), end="")
        return
    # Imported here so that --help and a misspelt flag answer at once.
    from dpojax import commands as command
    from dpojax.bench import bench
    from dpojax.chat import chat
    from dpojax.compilation_cache import use_compilation_cache
    from dpojax.exporting import export
    from dpojax.planning.command import plan
    from dpojax.precompute import reference
    from dpojax.run import run
    from dpojax.sampling import generate
    from dpojax.scoring import score
    from dpojax.sentiment import run_sentiment
    from dpojax.sweep.command import sweep

    use_compilation_cache()
    match config:
        # Before TrainConfig, whose settings they have.
        case BenchConfig():
            bench(config)
        case PlanConfig():
            plan(config)
        case SweepConfig():
            sweep(config)
        case ReferenceConfig():
            reference(config)
        case TrainConfig(model=None, data=()):
            run_sentiment(config)
        case TrainConfig():
            run(config)
        case EvalConfig():
            command.evaluate_policy(config)
        case LossesConfig():
            command.losses(config)
        case ScoreConfig():
            score(config)
        case InitConfig():
            command.init(config)
        case GenerateConfig(chat=True):
            chat(config)
        case GenerateConfig():
            generate(config)
        case ExportConfig():
            export(config)


def _show(config: ReportConfig | WatchConfig) -> None:
    """Apart from the other commands: these need no plots, and plots need no devices."""
    from dpojax.report.page import report
    from dpojax.report.serve import watch

    if not config.runs:
        raise ValueError("No run was given; name one or more run directories.")
    match config:
        case ReportConfig():
            report(config)
        case WatchConfig():
            watch(config)


def _complete(config: CompletionConfig) -> None:
    """Apart too: the names of losses are jax's to import, which takes a second."""
    from dpojax.losses.table import MIXTURES, OBJECTIVES

    losses, cli = [*OBJECTIVES, *MIXTURES], _make_cli(TrainConfig())
    print(as_script(config.shell, flags=_ORIGIN_FLAGS, losses=losses, cli=cli), end="")


def _take_origin(arguments: list[str]) -> tuple[TrainConfig, list[str], bool]:
    """Where a run's settings come from: a Python file, a recipe, or flags alone."""
    command, *rest = arguments
    if rest and rest[0].endswith(".py"):
        train = _load_experiment(Path(rest.pop(0)))
    else:
        train = TrainConfig()
    if not any(flag.startswith(_ORIGIN_FLAGS) for flag in rest):
        return train, [command, *rest], False
    # Imported here: reading recipes would slow down every start.
    from dpojax.from_trl.flags import as_lines, from_recipe, take_flags

    origin, rest = take_flags(rest)
    if origin.print_config and command != "train":
        raise ValueError("--print-config is a flag of train, whose file it prints.")
    if origin.recipe is not None:
        if train != TrainConfig():
            raise ValueError("Give an experiment file or --from-trl, not both.")
        converted = from_recipe(origin, rest)
        train = converted.config
        print(*as_lines(converted), sep="\n", file=sys.stderr)
    return train, [command, *rest], origin.print_config


def _load_experiment(path: Path) -> TrainConfig:
    """The configuration that a Python file's ``config()`` returns."""
    make = load_names(path, "experiment").get("config")
    made = make() if callable(make) else None
    if not isinstance(made, TrainConfig):
        raise ValueError(f"{path} has no function config() that returns a TrainConfig.")
    return made


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Shows what cannot be raised, but for writes that Orbax no longer waits for.

    TensorStore reports each to an event loop that is closed once one write has failed.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _where() -> str:
    """Which of several processes this is."""
    jax = sys.modules.get("jax")  # where nothing has needed it, there is but one
    if jax is None or not jax.distributed.is_initialized():
        return ""
    return f" in process {jax.process_index()} of {jax.process_count()}"


def _is_ours(error: BaseException) -> bool:
    """Whether dpojax itself raised it: then its sentence is meant for the user."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(
        _PACKAGE
    )
