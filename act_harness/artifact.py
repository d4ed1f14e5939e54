"""Head-set artifacts: which heads of which model to calibrate, how, and where that came from.

An artifact is one JSON file (never pickle): the model it was made for, the calibration, the heads,
optionally a mass map per head, the search that found them and its provenance. Its schema is
``act-harness/heads/1`` wherever that has all it uses, and ``act-harness/heads/2`` where it uses
members of the operation that came later; both are read. Unknown keys are errors. Loading checks
form; :meth:`Artifact.verify` checks that it fits a model. No torch here.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from act_harness.calibration import Calibration, HeadStrength, LayerPlan, validation_line
from act_harness.errors import ArtifactError, CalibrationError, suggestion
from act_harness.support import atomic, hub, paths, reading
from act_harness.support.provenance import sha256_json

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Artifact", "ModelFacts", "load_artifact", "resolve_artifact", "shipped_artifacts"]

SCHEMA: Literal["act-harness/heads/1"] = "act-harness/heads/1"
SCHEMA_2: Literal["act-harness/heads/2"] = "act-harness/heads/2"
_FIRST = {"target": ("sinks", "initial"), "mass": ("damp", "reweight")}
"""What the first schema knows of the sets that have grown since."""
_MOST_BYTES = 1 << 26
"""Of an artifact from the hub; a table of 10,000 heads on ten tasks has a quarter of it."""
_STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelFacts(BaseModel):
    """What identifies a model; None means unknown and is not checked."""

    model_config = _STRICT

    id: str
    """Hub id or folder name the model was loaded from."""
    architecture: str
    """Class of the model, for example ``LlamaForCausalLM``."""
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    """Query heads side by side share one of these; heads are drawn by it, nothing is checked."""
    weights_sha256: str | None = None
    """Fingerprint of the weights, see :func:`act_harness.attention.weights_fingerprint`."""
    adapter: str | None = None
    """Names, kinds and hash of active peft adapters; the other facts are the base model's."""
    revision: str | None = None
    tokenizer_sha256: str | None = None
    """Hash of vocabulary and special tokens; information where the probe is known."""
    tokenizer_probe_sha256: str | None = None
    """Hash of the token ids of fixed texts, which is the tokenizer's identity."""
    chat_probe_sha256: str | None = None
    """Hash of the token ids of a fixed conversation under the chat template."""
    dtype: str | None = None
    chat_template_sha256: str | None = None
    adds_bos: bool | None = None

    def knows_tokens(self, other: ModelFacts) -> bool:
        """Say whether both sides know what their tokenizer does, so that files need not agree."""
        return None not in (self.tokenizer_probe_sha256, other.tokenizer_probe_sha256)


class Artifact(BaseModel):
    """A head set with everything needed to apply it and to judge it."""

    model_config = _STRICT

    schema_: Literal["act-harness/heads/1", "act-harness/heads/2"] = Field(
        default=SCHEMA, alias="schema"
    )
    """The first schema that holds all that is used, whichever was given."""
    name: str = Field(min_length=1)
    model: ModelFacts
    calibration: Calibration
    heads: dict[int, tuple[int, ...]]
    """Selected heads by layer, both counted from 0."""
    strengths: dict[int, dict[int, HeadStrength]] | None = None
    """Mass map of single heads; the calibration's own for all others."""
    search: dict[str, Any] | None = None
    """Recipe, splits, table of effects, controls; None for a published list."""
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("calibration", mode="before")
    @classmethod
    def _build_calibration(cls, value: Any) -> Any:  # noqa: ANN401 - raw input
        if isinstance(value, dict):
            try:
                return Calibration(**value)
            except CalibrationError as error:
                raise ValueError(str(error).removeprefix("calibration: ")) from None
        return value

    @field_validator("heads")
    @classmethod
    def _sort_heads(cls, value: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(sorted(value[layer])) for layer in sorted(value)}

    @model_validator(mode="after")
    def _check_heads(self) -> Artifact:
        layers, heads = self.model.num_hidden_layers, self.model.num_attention_heads
        for layer, chosen in self.heads.items():
            if not 0 <= layer < layers:
                raise ValueError(f"layer {layer} is out of range, the model has 0..{layers - 1}")
            for head in chosen:
                if not 0 <= head < heads:
                    raise ValueError(
                        f"head {head} of layer {layer} is out of range, "
                        f"the model has heads 0..{heads - 1}"
                    )
            if len(set(chosen)) != len(chosen):
                raise ValueError(f"layer {layer} names a head twice: {sorted(chosen)}")
        for layer, own in (self.strengths or {}).items():
            for head, strength in own.items():
                if head not in self.heads.get(layer, ()):
                    raise ValueError(f"strengths name head {head} of layer {layer}, heads do not")
                reason = self.calibration.misfit(strength)
                if reason:
                    raise ValueError(f"strengths of head {head} of layer {layer}: {reason}")
        return self

    @model_validator(mode="after")
    def _check_schema(self) -> Artifact:
        later = self._later()
        if later and self.schema_ == SCHEMA and "schema_" in self.model_fields_set:
            raise ValueError(f"{later} is not of schema {SCHEMA!r}; expected {SCHEMA_2!r}")
        object.__setattr__(self, "schema_", SCHEMA_2 if later else SCHEMA)  # frozen for all others
        return self

    def _later(self) -> str:
        """Name a member of the operation that the first schema does not know; "" if there is none.

        Every setting that came with the second schema belongs to such a member.
        """
        own = [strength for heads in (self.strengths or {}).values() for strength in heads.values()]
        found = [("target", self.calibration.target), ("mass", self.calibration.mass)]
        found += [("mass", strength.mass) for strength in own]
        return next((f"{name} {value!r}" for name, value in found if value not in _FIRST[name]), "")

    def plans(self) -> dict[int, LayerPlan]:
        """Return what each layer with selected heads is to do."""
        default = LayerPlan.uniform(self.calibration, (0,)).strengths[0]
        result = {}
        for layer in self.heads:
            heads = self.heads[layer]
            own = (self.strengths or {}).get(layer, {})
            if heads:
                strengths = tuple(own.get(head, default) for head in heads)
                result[layer] = LayerPlan(self.calibration, heads, strengths, layer)
        return result

    def head_count(self) -> int:
        """Return the number of selected heads."""
        return sum(len(heads) for heads in self.heads.values())

    def judgement(self) -> tuple[str, bool]:
        """Say in a line what the heads are worth, and whether an interval of that excludes zero.

        The figures are of documents that neither found nor chose the heads: of an evaluation where
        they were recorded (``search.held_out``), else the search's own (``search.judgement``).
        """
        if self.search is None:
            return "a published list, not judged here", False
        found = self.search.get("held_out") or self.search.get("judgement")
        if found is None:
            return "not judged on documents of its own (searched before that was done)", False
        try:
            columns = [
                (str(name), float(one["difference"]), one["interval"])
                for name, one in found["columns"].items()
            ]
            spans = [
                None if low is None else (float(low), float(high)) for *_, (low, high) in columns
            ]
            said = str(found["verdict"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return "its record of a judgement cannot be read (written by another version?)", False
        parts = [
            f"{name.replace('_', ' ')} {100 * difference:+.1f}"
            + ("" if span is None else f", {100 * span[0]:+.1f} to {100 * span[1]:+.1f}")
            for (name, difference, _), span in zip(columns, spans, strict=True)
        ]
        said = f"{said}{': ' if parts else ''}{'; '.join(parts)}"
        if any(span is None or span[0] <= 0.0 <= span[1] for span in spans):
            return f"{said} (an interval includes 0)", False
        return said, bool(parts)

    def document(self) -> dict[str, Any]:
        """Return the artifact as the JSON document that is stored."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"calibration", "strengths"})
        content["schema"] = SCHEMA_2 if self._later() else SCHEMA
        content["model"] = self.model.model_dump(exclude_none=True)
        content["calibration"] = self.calibration.settings()
        content["heads"] = {str(layer): list(chosen) for layer, chosen in self.heads.items()}
        if self.strengths:
            content["strengths"] = {
                str(layer): {str(h): s.model_dump(exclude_none=True) for h, s in own.items()}
                for layer, own in self.strengths.items()
            }
        return content

    def sha256(self) -> str:
        """Return the hash of what decides scores: calibration, heads and strengths."""
        content = self.document()
        decisive = {key: content.get(key) for key in ("calibration", "heads", "strengths")}
        return sha256_json(decisive)

    def text(self) -> str:
        """Return what :meth:`save` writes: indented JSON with sorted keys."""
        return json.dumps(self.document(), indent=1, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the artifact atomically as indented JSON with sorted keys."""
        target = Path(path)
        atomic.write_text(target, self.text())
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        base_model: str | None = None,
        path_in_repo: str = hub.DEFAULT_FILE,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the artifact, its map of heads and a model card to the hub, in one commit.

        Args:
            repo_id: ``OWNER/REPO``; made where it does not exist.
            license: The hub's name of a licence; needed unless the repository's card has one.
            base_model: Hub id of the model; None: the recorded one, if it can be one.
            path_in_repo: The artifact's file, in folders where a repository holds several.
            revision: Branch, which is made where it does not exist; None: the main branch.
            private: Whether a new repository is; None: the owner's default.
            token: As huggingface_hub takes it; None: the one that is stored.
            commit_message: Subject of the commit.
            create_pr: Open a pull request instead of writing to the branch.

        Returns:
            huggingface_hub's description of the commit: ``oid``, ``commit_url``, ``pr_url``.

        Raises:
            InputError: No token, no right to write, or something that the hub does not take.
            InfrastructureError: The hub cannot be reached or is out of order.
        """
        from act_harness.sharing.push import push  # stands above: the card draws what was measured

        return push(
            self,
            repo_id,
            license=license,
            base_model=base_model,
            path_in_repo=path_in_repo,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        repo: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        filename: str = hub.DEFAULT_FILE,
        token: str | bool | None = None,
    ) -> Artifact:
        """Load an artifact from a repository on the hub, or from a folder that holds one.

        Args:
            repo: ``OWNER/REPO``, or a folder.
            revision: branch, tag or commit on the hub; None: the main branch.
            subfolder: where the file is in the repository or folder.
            filename: the file.
            token: as huggingface_hub takes it; None: the one that is stored.

        Raises:
            ArtifactError: there is no such repository, revision or file, or it is malformed.
            InfrastructureError: the hub cannot be reached, and it is not in the cache.
        """
        name = f"{subfolder.strip('/')}/{filename}" if subfolder else filename
        if reading.is_folder(repo):
            return load_artifact(Path(repo, name))
        return _load_from_hub(hub.named(str(repo), name, revision, error=ArtifactError), token)

    def verify(self, facts: ModelFacts) -> None:
        """Check that the artifact fits the model at hand.

        Raises:
            ArtifactError: another architecture, grid or tokenizer.

        Warns:
            UserWarning: another revision, weights, dtype or peft adapter, a tokenizer with another
                file and the same token ids, or a hash that was never recorded.
        """
        mine = self.model
        for key in ("architecture", "num_hidden_layers", "num_attention_heads"):
            want, have = getattr(mine, key), getattr(facts, key)
            if want != have:
                raise ArtifactError(
                    f"artifact {self.name!r} was made for {mine.id!r} with {key} {want}, "
                    f"this model has {have}; search for heads of this model or use artifact=none"
                )
        self._check_tokenizer(facts)
        self._warn(facts)

    def _check_tokenizer(self, facts: ModelFacts) -> None:
        """Refuse other token ids; another file with the same ids is a warning (:meth:`_warn`)."""
        mine = self.model
        keys = {
            "tokenizer_probe_sha256": "other token ids for the same texts",
            "chat_probe_sha256": "a chat template that gives other token ids",
        }
        if not mine.knows_tokens(facts):  # made before there was a probe
            keys = {"tokenizer_sha256": "another vocabulary or other special tokens"}
        for key, found in keys.items():
            want, have = getattr(mine, key), getattr(facts, key)
            if want is not None and have is not None and want != have:
                raise ArtifactError(
                    f"artifact {self.name!r} was made with another tokenizer: this one has {found} "
                    f"({key} {have[:12]}, expected {want[:12]}); load the model with the "
                    f"tokenizer of {mine.id!r} or search again"
                )

    def _warn(self, facts: ModelFacts) -> None:
        mine = self.model
        keys = ["weights_sha256", "revision", "dtype", "chat_template_sha256", "adds_bos"]
        if mine.knows_tokens(facts):
            keys.append("tokenizer_sha256")
        for key in keys:
            want, have = getattr(mine, key), getattr(facts, key)
            if want is not None and have is not None and want != have:
                shown = [v[:12] if key.endswith("sha256") else v for v in (str(want), str(have))]
                same = "; both give the same token ids" if key == "tokenizer_sha256" else ""
                warnings.warn(
                    f"artifact {self.name!r} was made with {key} {shown[0]}, "
                    f"this model has {shown[1]}{same}",
                    stacklevel=3,
                )
        if mine.adapter != facts.adapter:
            warnings.warn(
                f"artifact {self.name!r} was made {_with_adapter(mine.adapter)}, this model is "
                f"{_with_adapter(facts.adapter)}, and an adapter changes the weights",
                stacklevel=3,
            )
        if mine.weights_sha256 is None and mine.revision is None:
            warnings.warn(
                f"artifact {self.name!r} records no weights hash; "
                "only architecture and head grid were checked",
                stacklevel=3,
            )


def _with_adapter(adapter: str | None) -> str:
    return "without a peft adapter" if adapter is None else f"with the peft adapter {adapter}"


def _parse(text: str, source: str) -> Artifact:
    content = reading.parse_json(
        text, source=f"artifact {source}", error=ArtifactError, advice=_EXPECTED
    )
    if not isinstance(content, dict):
        raise ArtifactError(f"artifact {source} is not a JSON object; expected schema {SCHEMA}")
    return _validated(content, source)


def _validated(content: dict[str, Any], source: str) -> Artifact:
    unknown = [str(key) for key in content if key not in _KEYS]
    if unknown:
        hint = suggestion(unknown[0], _KEYS)
        raise ArtifactError(f"artifact {source} has the unknown key {unknown[0]!r}{hint}")
    if "schema" not in content:
        raise ArtifactError(
            f"artifact {source} has no 'schema'; expected {SCHEMA!r} or {SCHEMA_2!r}"
        )
    for name, numbered in _numbered(content):
        wrong = [key for key in numbered if not _NUMBER.fullmatch(key)]
        if wrong:
            raise ArtifactError(
                f"artifact {source}: {name} has the key {wrong[0][:40]!r}, expected the number of "
                "a layer or head as JSON's keys write it: 0, 1, 2, ..."
            )
    try:
        return reading.validated(Artifact, content)
    except ValidationError as error:
        raise ArtifactError(f"artifact {source}: {validation_line(error)}") from None


def _numbered(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects whose keys are numbers: one spelling each, so that none is named twice."""
    for name in ("heads", "strengths"):
        given = content.get(name)
        if isinstance(given, dict):
            yield name, given
            inner = [own for own in given.values() if isinstance(own, dict)]
            yield from ((name, own) for own in inner)


_EXPECTED = "expected a file written by 'act-harness search'"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_KEYS = {field.alias or name for name, field in Artifact.model_fields.items()}


def shipped_artifacts() -> dict[str, Path]:
    """Return the artifacts that come with the package, by name (``model/name``)."""
    root = paths.artifacts_path()
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.glob("*/*.json"))
    }


def load_artifact(reference: str | Path | Mapping[str, Any]) -> Artifact:
    """Load an artifact from a path, the name of a shipped one, the hub, or its document.

    Args:
        reference: A path, the name of a shipped artifact, ``hub:OWNER/REPO@REVISION/FOLDER/FILE``
            (without ``@`` the main branch, without a file ``heads.json``; what it resolved to, the
            commit, is noted as ``provenance["hub"]``), or the JSON object itself.

    Raises:
        ArtifactError: not found (with the nearest known name), or malformed.
        InfrastructureError: on the hub, which cannot be reached, and not in the cache.
    """
    if isinstance(reference, Mapping):
        return _validated(dict(reference), "given as a dict")
    if not isinstance(reference, (str, os.PathLike)):
        raise ArtifactError(
            f"an artifact was given as {type(reference).__name__}; expected an Artifact, a path, "
            "the name of a shipped one, hub:OWNER/REPO, or a dict of its content"
        )
    text = str(reference)
    if text.startswith(hub.PREFIX):
        return _load_from_hub(hub.parse(text, error=ArtifactError))
    path = Path(text) if reading.is_file(text) else _shipped_path(text)
    return _parse(reading.read_text(path, error=ArtifactError, advice=_EXPECTED), text)


def _shipped_path(name: str) -> Path:
    known = shipped_artifacts()
    matches = [key for key in known if name in (key, key.rpartition("/")[2])]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise ArtifactError(f"artifact {name!r} is ambiguous, name one of {', '.join(matches)}")
    short = {key.rpartition("/")[2] for key in known}
    hint = reading.nearest_beside(name, "*.json") or suggestion(name, [*known, *short])
    raise ArtifactError(
        f"artifact {name!r} is neither a file nor a shipped artifact{hint}"
        if hint
        else f"artifact {name!r} is neither a file nor a shipped artifact; "
        "`act-harness artifact list` names those, artifact=none is the baseline"
    )


def _load_from_hub(source: hub.HubFile, token: str | bool | None = None) -> Artifact:
    found = hub.fetch(source, most_bytes=_MOST_BYTES, token=token, error=ArtifactError)
    text = reading.read_text(
        found.path, error=ArtifactError, advice=_EXPECTED, most_bytes=_MOST_BYTES
    )
    artifact = _parse(text, str(source))
    noted = {**artifact.provenance, "hub": str(found.source)}
    return artifact.model_copy(update={"provenance": noted})


def resolve_artifact(
    reference: str | Path | Mapping[str, Any] | Artifact | None, facts: ModelFacts
) -> Artifact | None:
    """Turn what a user gave into a verified artifact, or None for the baseline.

    ``none`` (or None) is the baseline; an empty string stands for "not given": the one shipped
    artifact that fits the model.

    Raises:
        ArtifactError: unknown, malformed, for another model, or none shipped for this one.
    """
    if reference is None or (isinstance(reference, str) and reference.lower() == "none"):
        return None
    if isinstance(reference, Artifact):
        artifact = reference
    elif reference == "":
        artifact = _only_match(facts)
    else:
        artifact = load_artifact(reference)
    artifact.verify(facts)
    return artifact


def _only_match(facts: ModelFacts) -> Artifact:
    fitting = {}
    for name, path in shipped_artifacts().items():
        candidate = load_artifact(path)
        if _same_model(candidate.model, facts):
            fitting[name] = candidate
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    found = (
        f"several shipped ones fit {facts.id!r} ({', '.join(fitting)})"
        if fitting
        else f"no shipped artifact fits {facts.id!r}"
    )
    raise ArtifactError(
        f"no artifact was given and {found}; "
        "give artifact=PATH, artifact=NAME, or artifact=none for the baseline"
    )


def _same_model(mine: ModelFacts, facts: ModelFacts) -> bool:
    if (mine.architecture, mine.num_hidden_layers, mine.num_attention_heads) != (
        facts.architecture,
        facts.num_hidden_layers,
        facts.num_attention_heads,
    ):
        return False
    if mine.weights_sha256 is not None and facts.weights_sha256 is not None:
        return mine.weights_sha256 == facts.weights_sha256
    return mine.id.rpartition("/")[2].lower() == facts.id.rstrip("/").rpartition("/")[2].lower()
