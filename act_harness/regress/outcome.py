"""What a regression run says: verdict, findings, tables; as text, JSON and Markdown.

The Markdown file is made to be a nightly job's summary. A run that could not be finished leaves
the same two files with its error, so that no older verdict is mistaken for this run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from act_harness.errors import ActHarnessError, InfrastructureError
from act_harness.evidence.comparison import Comparison
from act_harness.evidence.tables import markdown_cell, markdown_table
from act_harness.regress.goldens import Drift, Finding
from act_harness.support import atomic

__all__ = ["RegressOutcome", "clear_report", "write_failure", "write_report"]

SCHEMA = "act-harness/regress/1"
JSON_FILE, MARKDOWN_FILE = "regress.json", "regress.md"


@dataclass(frozen=True)
class RegressOutcome:
    """One run held against its baseline."""

    suite: str
    layers: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    drifts: tuple[Drift, ...]
    comparison: Comparison | None
    """Baseline and run, rows named ``task@arm``; None where no task could be paired."""
    tolerance: float
    """Of a log-likelihood, in nats."""
    baseline: Mapping[str, Any]
    """Reason, date and commit of the baseline."""
    provenance: Mapping[str, Any]
    tracked: str = ""
    """Where the tracked run is, as a line for people."""

    @property
    def status(self) -> Literal["passed", "regressed"]:
        """The verdict."""
        return "regressed" if self.findings else "passed"

    @property
    def exit_code(self) -> int:
        """0 passed, 1 regressed."""
        return 1 if self.findings else 0

    def headline(self) -> str:
        """Return the verdict in one line."""
        if not self.findings:
            largest = max((row.drift for row in self.drifts), default=0.0)
            documents = sum(row.documents for row in self.drifts)
            return f"{self.suite}: passed ({documents} answers, largest drift {largest:.1e} nats)"
        tasks = {name: None for one in self.findings for name in one.task.split(", ")}
        return f"{self.suite}: regressed ({len(self.findings)} findings in {', '.join(tasks)})"

    def to_terminal(self, *, colour: bool = False) -> str:
        """Return everything as text for a terminal."""
        parts = []
        if self.comparison is not None:
            rows = tuple(row for row in self.comparison.rows if row.headline)
            shown = replace(self.comparison, rows=rows)
            parts.append(shown.to_terminal(colour=colour))
        parts += [f"{row.task}, arm {row.arm}: drift {row.drift:.1e} nats, {row.flips} flips"
                  for row in self.drifts]  # fmt: skip
        parts += [f"note: {note}" for note in self.notes]
        parts += [f"FAILED {finding.line()}" for finding in self.findings]
        return "\n".join([*parts, self.headline()])

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "status": self.status,
            "exit_code": self.exit_code,
            "layers": list(self.layers),
            "findings": [asdict(finding) for finding in self.findings],
            "notes": list(self.notes),
            "tolerance": self.tolerance,
            "drifts": [row._asdict() for row in self.drifts],
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "baseline": dict(self.baseline),
            "provenance": dict(self.provenance),
        }

    def to_markdown(self) -> str:
        """Return everything as Markdown."""
        lines = [f"## Regression suite {markdown_cell(self.suite)}: **{self.status}**", "",
                 markdown_cell(self.headline()), ""]  # fmt: skip
        if self.findings:
            found = [(one.task, one.arm or "all", one.kind, one.text) for one in self.findings]
            header = ["task", "arm", "what", "details"]
            lines.append(markdown_table(header, found, right=(), compact=True))
        header = ["task", "arm", "answers", "drift (nats)", "flips", "near threshold"]
        drifts = [
            (row.task, row.arm, row.documents, f"{row.drift:.1e}", row.flips, row.near)
            for row in self.drifts
        ]
        lines.append(markdown_table(header, drifts, right=range(2, 6), compact=True).rstrip())
        if "goldens" in self.layers:
            lines += ["", f"Tolerated drift: {self.tolerance:g} nats, no flips."]
        if self.comparison is not None:
            lines += ["", self.comparison.to_markdown(headline_only=True).rstrip()]
        lines += ["", *(f"- {markdown_cell(note)}" for note in self.notes)]
        known = self.baseline
        lines += ["", f"Baseline of {known.get('created')}, commit {known.get('commit')}: "
                  f"{markdown_cell(known.get('reason'))}. This run: commit "
                  f"{self.provenance.get('commit')}"
                  f"{', changed since' if self.provenance.get('dirty') else ''}."]  # fmt: skip
        return "\n".join(lines).rstrip() + "\n"


def clear_report(folder: Path) -> None:
    """Remove an earlier report, so that a run that is killed leaves none."""
    for name in (JSON_FILE, MARKDOWN_FILE):
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise InfrastructureError(f"cannot remove {folder / name}: {error}") from error


def write_report(outcome: RegressOutcome, folder: Path) -> tuple[Path, Path]:
    """Write ``regress.json`` and ``regress.md``.

    Raises:
        InfrastructureError: The folder cannot be written.
    """
    return (
        atomic.write_json(folder / JSON_FILE, outcome.to_json()),
        atomic.write_text(folder / MARKDOWN_FILE, outcome.to_markdown()),
    )


def write_failure(suite: str, error: ActHarnessError, folder: Path) -> None:
    """Write why a run has no verdict, in the same files."""
    status = "infrastructure" if isinstance(error, InfrastructureError) else "bad input"
    text = " ".join(str(error).split())
    content = {"schema": SCHEMA, "suite": suite, "status": status, "exit_code": error.exit_code,
               "message": text}  # fmt: skip
    atomic.write_json(folder / JSON_FILE, content)
    heading = f"## Regression suite {markdown_cell(suite)}: no verdict ({status})"
    atomic.write_text(folder / MARKDOWN_FILE, f"{heading}\n\n{markdown_cell(text)}\n")
