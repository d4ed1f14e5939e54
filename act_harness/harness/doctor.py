"""What ``act-harness doctor`` says: what is found, by which route, and what is off.

It tries the routes for real, in the process it runs in: it imports torch, lets lm-eval fill its
table of models, and asks for ``hf-act``. Nothing is registered on the way, so the answer is the
one that plain ``lm_eval`` would get from the same environment.

It changes nothing, downloads nothing and loads no model weights.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from act_harness import plugin
from act_harness.errors import EXTRAS, ActHarnessError, install_command
from act_harness.support import paths

__all__ = ["Diagnosis", "Finding", "examine", "render"]

State = Literal["ok", "off", "fail"]

_DISTRIBUTION = "act-harness"
_REQUIRED = ("lm_eval", "torch", "transformers", "accelerate", "datasets", "pydantic", "scipy")
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class Finding(NamedTuple):
    """One line of the answer."""

    topic: str
    state: State
    """``ok``, ``off`` (not in use, and nothing is wrong with that) or ``fail``."""
    text: str
    """What was found and, unless all is well, what to do."""


class Diagnosis(NamedTuple):
    """All findings, and the one fact the exit code depends on."""

    findings: tuple[Finding, ...]
    reachable: bool
    """Whether plain ``lm_eval --model hf-act`` gets the model class here."""

    @property
    def verdict(self) -> str:
        """The last line: whether it works, and that something else does not."""
        model = f"`lm_eval --model {plugin.MODEL_NAME}`"
        failed = [finding.topic.strip() for finding in self.findings if finding.state == "fail"]
        if not self.reachable:
            return f"{model} does not work here; see the lines with 'fail'."
        if failed:
            return f"{model} works here, but not all is well: see 'fail' at {', '.join(failed)}."
        return f"{model} works here."


def examine() -> Diagnosis:
    """Look at this environment; imports torch and lm-eval's model (a few seconds)."""
    harness = _harness()
    findings = [_installation(), *_versions(), harness]
    model, reachable = _model()
    reachable = reachable and harness.state == "ok"
    findings += [*_routes(), model, _tasks(), *_artifacts(), _device(), *_extras()]
    return Diagnosis(tuple(findings), reachable)


def render(diagnosis: Diagnosis) -> str:
    """Return the findings as aligned lines, with the verdict last."""
    topics = max(len(finding.topic) for finding in diagnosis.findings)
    lines = [f"{f.state:<4}  {f.topic:<{topics}}  {f.text}" for f in diagnosis.findings]
    return "\n".join([*lines, "", diagnosis.verdict])


def _installation() -> Finding:
    folder = Path(__file__).resolve().parents[1]
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        text = f"{folder} is a bare checkout, not installed; run `pip install -e .` there"
        return Finding(_DISTRIBUTION, "fail", text)
    kind = "editable install of" if paths.is_checkout() else "installed at"
    return Finding(_DISTRIBUTION, "ok", f"{version}, {kind} {folder}")


def _versions() -> list[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    findings = [Finding("python", "ok", f"{version}, {sys.executable}")]
    for name in _REQUIRED:
        found = _version(name)
        text = found or f"not installed; run `pip install {name}`"
        findings.append(Finding(name, "ok" if found else "fail", text))
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _harness() -> Finding:
    folder = paths.lm_eval_path()
    if folder is not None:
        return Finding("lm-eval package", "ok", str(folder))
    if _version("lm_eval") is None:
        return Finding("lm-eval package", "fail", "not installed")
    text = (
        "an editable lm-eval is hidden by the folder lm_eval/ that holds our task files; "
        "reinstall it with `pip install -e LM_EVAL --config-settings editable_mode=compat`"
    )
    return Finding("lm-eval package", "fail", text)


def _routes() -> list[Finding]:
    """Say which of the two entry points exist, and whether torch may call the second."""
    own = [entry.value for entry in _entries("lm_eval.models") if entry.name == plugin.MODEL_NAME]
    hooks = [entry.value for entry in _entries("torch.backends") if "act_harness" in entry.value]
    missing = "entry point not installed; run `pip install -e .` or use `act-harness run`"
    findings = [
        Finding("entry lm_eval.models", "ok" if own else "fail", own[0] if own else missing),
        Finding("entry torch.backends", "ok" if hooks else "fail", hooks[0] if hooks else missing),
    ]
    if os.environ.get(_AUTOLOAD, "1") != "1":
        text = f"{_AUTOLOAD}={os.environ[_AUTOLOAD]} keeps torch from loading the hook"
        findings.append(Finding("torch autoload", "off", text))
    return findings


def _entries(group: str) -> list[metadata.EntryPoint]:
    return list(metadata.entry_points(group=group))


def _model() -> tuple[Finding, bool]:
    """Ask lm-eval for the model, as its own command line would."""
    topic = f"model {plugin.MODEL_NAME}"
    try:
        importlib.import_module("torch")
        waiting = plugin.installed()
        found = plugin.lookup()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is the finding
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(topic, "fail", reason), False
    if found is None:
        cause = "; ".join(plugin.failures()) or "no hook ran"
        text = f"unknown to lm-eval: {cause}; use `act-harness run` instead of `lm_eval`"
        return Finding(topic, "fail", text), False
    route = "torch's extension autoload" if waiting else "lm-eval's own plug-in discovery"
    return Finding(topic, "ok", f"{found}, by {route}"), True


def _tasks() -> Finding:
    try:
        route = paths.task_route()
    except ActHarnessError as error:
        return Finding("tasks", "fail", str(error))
    return Finding("tasks", "ok" if route.found else "fail", route.text)


def _artifacts() -> list[Finding]:
    """Name what is shipped, and say of every set that a search found what it is worth."""
    try:
        from act_harness.artifact import load_artifact  # a missing pydantic is a finding too

        folder = paths.artifacts_path()
        found = {
            path.relative_to(folder).with_suffix("").as_posix(): load_artifact(path)
            for path in sorted(folder.glob("*/*.json"))
        }
    except (ActHarnessError, ImportError) as error:
        return [Finding("artifacts", "fail", str(error))]
    text = f"{len(found)} shipped: {', '.join(found) or '-'}"
    judged = [
        Finding("", "ok", f"{name}: {artifact.judgement()[0]}")  # of its model alone
        for name, artifact in found.items()
        if artifact.search is not None
    ]
    return [Finding("artifacts", "ok", text), *judged]


def _device() -> Finding:
    try:
        import torch
    except Exception:  # noqa: BLE001 - said above, under the model
        return Finding("device", "fail", "torch cannot be imported")
    if torch.cuda.is_available():
        return Finding("device", "ok", f"cuda, {torch.cuda.get_device_name()}")
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'' if threads == 1 else 's'}"
    return Finding("device", "ok", f"cpu, {counted} (no CUDA device)")


def _extras() -> list[Finding]:
    findings = []
    for extra, requirements in EXTRAS.items():
        names = [requirement.partition(">=")[0] for requirement in requirements]
        missing = [name for name in names if _version(name) is None]
        text = f"not installed: {', '.join(missing)}; run `{install_command(extra)}`"
        findings.append(
            Finding(f"extra {extra}", "off" if missing else "ok", text if missing else "installed")
        )
    return findings
