"""Options that several commands share, and :func:`with_tracking`, which adds those of W&B.

Nothing heavy is imported: `act-harness --help` reads this module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from act_harness.cli.parsing import names
from act_harness.errors import InputError
from act_harness.tracking.tracker import TrackingSettings, check_installed

__all__ = [
    "DataDir", "Device", "IncludePath", "ModelArgs", "Pretrained", "RecipeName", "RecipeSamples",
    "RecipeSeed", "RecipeTasks", "Reference", "Seed", "Tasks", "WandbEntity", "WandbGroup",
    "WandbMode", "with_tracking",
]  # fmt: skip

ModelArgs = Annotated[
    str,
    typer.Option(
        "--model-args",
        "-a",
        help="The model's arguments as lm-eval takes them: pretrained=DIR,dtype=float32,...",
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Hub id or folder of the model; the same as --model-args pretrained=..."),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks", "-t", help="Names of tasks or groups, or YAML files, separated by commas."
    ),
]
IncludePath = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of your own task files; may be given several times."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder filled by `act-harness fetch`; datasets are read from there."),
]
RecipeName = Annotated[
    str | None,
    typer.Argument(help="A recipe file or the name of a shipped one; options override it."),
]
RecipeTasks = Annotated[str, typer.Option("--tasks", help="Task names, separated by commas.")]
RecipeSamples = Annotated[
    int | None, typer.Option(help="Documents per task. [default: the recipe's number]")
]
RecipeSeed = Annotated[int | None, typer.Option(help="Seed. [default: the recipe's]")]
Reference = Annotated[
    str, typer.Argument(help="Path, shipped name, or hub:OWNER/REPO[@REVISION][/FILE].")
]

_WANDB = "Weights & Biases"
Mode = Literal["online", "offline"]
WandbEntity = Annotated[
    str | None,
    typer.Option(help="Owner of the project. [default: the key's]", rich_help_panel=_WANDB),
]
WandbGroup = Annotated[
    str | None,
    typer.Option(help="Common name of runs that belong together.", rich_help_panel=_WANDB),
]
WandbMode = Annotated[
    Mode | None,
    typer.Option(help="[default: WANDB_MODE, else online]", rich_help_panel=_WANDB),
]


def with_tracking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of W&B tracking.

    The command has a parameter ``tracking: TrackingSettings | None``, which is no option: it gets
    what the options say, None where ``--wandb-project`` was not given. It saves its results first,
    then hands the settings to :func:`act_harness.tracking.wandb_run.open_tracker` or a function
    above it.
    """
    kept = [parameter for parameter in _options_of(command) if parameter.name != "tracking"]
    added = _options_of(_tracking_settings)

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:  # noqa: ANN401 - as the command line has parsed them
        options = {parameter.name: given.pop(parameter.name) for parameter in added}
        command(**given, tracking=_tracking_settings(**options))

    wrapped.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
    del wrapped.__wrapped__
    return wrapped


def _options_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    # Not get_type_hints(): Python 3.10's hides an Annotated whose default is None in an Optional,
    # and typer then takes the argument for an option.
    return list(inspect.signature(function, eval_str=True).parameters.values())


def _tracking_settings(
    *,
    wandb_project: Annotated[
        str | None,
        typer.Option(
            help="Log to this W&B project, after the results are saved.", rich_help_panel=_WANDB
        ),
    ] = None,
    wandb_entity: WandbEntity = None,
    wandb_group: WandbGroup = None,
    wandb_tags: Annotated[
        str, typer.Option(help="Tags, separated by commas.", rich_help_panel=_WANDB)
    ] = "",
    wandb_mode: WandbMode = None,
    wandb_strict: Annotated[
        bool,
        typer.Option(
            help="Whether a failure of W&B is an error (exit code 3). [default: yes]",
            show_default=False,
            rich_help_panel=_WANDB,
        ),
    ] = True,
    wandb_samples: Annotated[
        int,
        typer.Option(
            min=0, help="Most samples to log per task; 0: no texts.", rich_help_panel=_WANDB
        ),
    ] = 500,
    wandb_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=86400,
            help="Seconds to wait for W&B when a run is opened.",
            rich_help_panel=_WANDB,
        ),
    ] = 60.0,
) -> TrackingSettings | None:
    if wandb_project is None:
        stray = {"--wandb-entity": wandb_entity, "--wandb-group": wandb_group,
                 "--wandb-tags": wandb_tags, "--wandb-mode": wandb_mode}  # fmt: skip
        for option, value in stray.items():
            if value:
                raise InputError(f"{option} was given without --wandb-project; name the project")
        return None
    check_installed()
    return TrackingSettings(
        project=wandb_project,
        entity=wandb_entity,
        group=wandb_group,
        tags=names(wandb_tags),
        mode=wandb_mode,
        strict=wandb_strict,
        max_samples=wandb_samples,
        start_timeout=wandb_timeout,
    )
