"""The commands ``explore`` and ``sinks``: from a model's arguments and documents to their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_harness.artifact import load_artifact, resolve_artifact
from act_harness.attention.parallel import refuse_parts
from act_harness.calibration import preset
from act_harness.errors import InputError, TaskError
from act_harness.exploration.effects import text_document
from act_harness.exploration.exploration import Exploration
from act_harness.exploration.explore import explore_document
from act_harness.exploration.maps import text_tokens
from act_harness.exploration.sinks import SinkStatistics, count_sinks
from act_harness.search.command import public_facts
from act_harness.search.documents import Document
from act_harness.search.prompting import Prompting
from act_harness.search.splits import evaluation_documents
from act_harness.support import places
from act_harness.support.checks import check_count, check_kind
from act_harness.support.model_arguments import model_arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from act_harness.harness.task_lookup import TaskSelection
    from act_harness.model import CalibratedHFLM

__all__ = [
    "ExploreSettings",
    "ModelSettings",
    "SinksSettings",
    "explore_from_settings",
    "sinks_from_settings",
    "task_documents",
]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, and how prompts are built, as the command line gives them."""

    pretrained: str | Path | None = None
    model_args: str | Mapping[str, Any] = ""
    """As lm-eval takes them: ``pretrained=DIR,dtype=float32``."""
    device: str | None = None
    include_path: Sequence[str | Path] = ()
    """Folders of further task files."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: the task's own number, or none."""
    apply_chat_template: bool = False
    data_dir: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the model's arguments, checked.

        Raises:
            InputError: they cannot be used, or name an artifact.
            InfrastructureError: there is no such model.
        """
        given = model_arguments(self.pretrained, self.model_args, device=self.device)
        if "artifact" in given:
            raise InputError("the model is looked at untouched; give --artifact, not artifact=")
        return given


@dataclass(frozen=True, kw_only=True)
class ExploreSettings(ModelSettings):
    """What ``act-harness explore`` is given; None and empty mean "not given"."""

    text: str | None = None
    """A prompt; its next token is looked at."""
    task: str | None = None
    doc: int = 0
    """Number of the task's document, as ``doc_id`` in samples files."""
    artifact: str | Path | None = None
    calibration: str = "paper"
    heads: Sequence[tuple[int, int]] = ()
    """Heads whose maps come first."""
    exact: int | None = None
    """Heads whose effect is computed exactly; None: as many as have their maps on the page."""
    output: Path = Path("explore.html")

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: Neither a text nor a task was given, or both, a number is out of range, or
                there is no such preset.
        """
        if (self.text is None) == (self.task is None):
            raise InputError(
                "expected a document to look at: give --text, or --task and --doc, not both"
            )
        check_count(self.doc, "--doc")
        check_count(self.exact, "--exact")
        preset(self.calibration)
        check_count(self.num_fewshot, "--num-fewshot")
        if isinstance(self.output, str):
            object.__setattr__(self, "output", Path(self.output))


def explore_from_settings(settings: ExploreSettings) -> Exploration:
    """Load the model, look at one document, and write the page.

    Raises:
        InputError: model, task, artifact or a range is wrong.
        InfrastructureError: model, data or disk are missing.
    """
    check_kind(settings, ExploreSettings, "settings")
    given = settings.arguments()
    if settings.artifact is not None:
        load_artifact(settings.artifact)  # before a model is loaded
    selection = None
    if settings.task is not None:
        from act_harness.harness.task_lookup import find_tasks

        selection = find_tasks((settings.task,), include_path=tuple(settings.include_path))
    reads = (settings.artifact, settings.task, *settings.include_path)
    places.prepare_file(settings.output, reads=reads)
    lm = load_model(given)
    artifact = resolve_artifact(settings.artifact, lm.facts)
    if selection is None:
        text = settings.text or ""
        tokens = text_tokens(lm.model, lm.tokenizer, text)
        document = text_document(lm.model, tokens, artifact, tokenizer=lm.tokenizer)
        title = "Next token"
    else:
        document = _only(selection, lm, settings)
        title = f"{document.task}, document {settings.doc}"
    found = explore_document(
        lm.model,
        lm.tokenizer,
        document,
        title=title,
        artifact=artifact,
        calibration=settings.calibration,
        heads=settings.heads,
        exact=settings.exact,
        progress=True,
    )
    found.save(settings.output)
    return found


def load_model(given: Mapping[str, Any]) -> CalibratedHFLM:
    """Load the stock model as an evaluation would."""
    from act_harness.model import CalibratedHFLM

    lm = CalibratedHFLM(artifact="none", **given)
    refuse_parts(lm.model, "an exploration")
    return lm


def task_documents(
    selection: TaskSelection,
    lm: CalibratedHFLM,
    settings: ModelSettings,
    *,
    first: int = 0,
    count: int,
) -> Iterator[Document]:
    """Yield documents of tasks, tokenised exactly as ``lm`` would score them."""
    contexts: dict[str, list[int]] = {}

    def encode(context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        if len(contexts) > 1:
            contexts.clear()  # one document's choices share a context, and no more is kept
        return lm._encode_request(context, continuation, contexts)

    chat = settings.apply_chat_template
    yield from evaluation_documents(
        selection,
        first=first,
        count=count,
        encode=encode,
        max_length=lm.max_length,
        prompting=Prompting(num_fewshot=settings.num_fewshot, apply_chat_template=chat),
        chat_template=lm.apply_chat_template if chat else None,
        data_dir=settings.data_dir,
    )


def _only(selection: TaskSelection, lm: CalibratedHFLM, settings: ExploreSettings) -> Document:
    """Return the one document that was named."""
    if len(selection.names) > 1:
        raise TaskError(
            f"--task {settings.task} names {len(selection.names)} tasks, expected one; give "
            f"{selection.names[0]}"
        )
    found = list(task_documents(selection, lm, settings, first=settings.doc, count=1))
    if len(found) > 1:
        raise TaskError(
            f"--task {settings.task} is a group of {len(found)} tasks, expected one; give "
            f"{found[0].task}"
        )
    if not found:
        raise TaskError(
            f"document {settings.doc} of {settings.task} is longer than the model's "
            f"{lm.max_length} tokens; give --doc of a shorter one"
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class SinksSettings(ModelSettings):
    """What ``act-harness sinks`` is given; None and empty mean "not given"."""

    tasks: Sequence[str] = ()
    limit: int = 100
    """Most documents of each task, from its first one on."""
    calibration: str = "paper"
    """Preset whose detection is used."""
    output: Path = Path("sinks")
    """Folder of the JSON file and the tables."""
    plots: bool = False
    """Draw them as PNG and SVG too."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be used.

        Raises:
            InputError: A number is out of range, or there is no such preset.
        """
        check_count(self.limit, "--limit", least=1)
        check_count(self.num_fewshot, "--num-fewshot")
        preset(self.calibration)
        if isinstance(self.output, str):
            object.__setattr__(self, "output", Path(self.output))


def sinks_from_settings(settings: SinksSettings) -> tuple[SinkStatistics, list[Path]]:
    """Load the model, count the sinks of the tasks' documents, and write the files.

    Returns:
        The statistics, and the files.

    Raises:
        InputError: model, tasks or a range is wrong.
        InfrastructureError: model, data or disk are missing.
    """
    from tqdm import tqdm

    from act_harness.harness.task_lookup import find_tasks

    check_kind(settings, SinksSettings, "settings")
    if settings.plots:
        from act_harness.evidence.figures import require_matplotlib

        require_matplotlib()
    given = settings.arguments()
    selection = find_tasks(tuple(settings.tasks), include_path=tuple(settings.include_path))
    places.prepare_folder(settings.output)
    lm = load_model(given)
    documents = task_documents(selection, lm, settings, count=settings.limit)
    found = count_sinks(
        lm.model,
        tqdm(documents, desc="documents", unit="doc"),
        calibration=preset(settings.calibration),
        vocabulary=lm.model.get_input_embeddings().num_embeddings,
    )
    about = {
        "model": public_facts(lm.facts).model_dump(exclude_none=True),
        "limit": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "apply_chat_template": settings.apply_chat_template,
    }
    return found, found.write(settings.output, lm.tokenizer, about, plots=settings.plots)
