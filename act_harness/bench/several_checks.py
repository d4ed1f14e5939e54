"""What must be the same on one device and on several: a function for each way of using them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from act_harness.artifact import ModelFacts, load_artifact
from act_harness.bench.scoring import random_heads
from act_harness.bench.several_compare import (
    Arm,
    Difference,
    Tolerance,
    arms_in,
    compare_arms,
    compare_artifacts,
)
from act_harness.bench.several_runs import Ran, Runner, kill_once_written, own_lines
from act_harness.errors import ActHarnessError, InputError
from act_harness.support.atomic import write_text
from act_harness.support.model_arguments import loading

__all__ = ["CHECKS", "Check", "Row", "SeveralDevices"]


class Row(NamedTuple):
    """What a check found."""

    name: str
    fate: str
    """``same``, ``differs``, ``refused`` (as it must be) or ``failed``."""
    largest: float | None
    """Difference of a number."""
    one: float | None
    """Seconds on one device."""
    several: float | None
    note: str = ""

    @property
    def fine(self) -> bool:
        """Whether it is as it should be."""
        return self.fate in ("same", "refused")


@dataclass
class SeveralDevices:
    """The model, and the runs on one device that all checks are held against."""

    pretrained: str
    tasks: str
    limit: int
    dtype: str
    runner: Runner
    samples: int
    """Documents of a search, on each of its splits."""
    _one: dict[str, Arm] | ActHarnessError | None = None
    _asking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Of what the commands write."""
        return self.runner.folder

    @property
    def tolerance(self) -> Tolerance:
        """Of the dtype."""
        return Tolerance.of(self.dtype)

    @cached_property
    def facts(self) -> ModelFacts:
        """Read what an artifact must know off the configuration; the model is large."""
        from transformers import AutoConfig

        with loading(self.pretrained):
            found = AutoConfig.from_pretrained(self.pretrained)
        config = found.get_text_config()
        return ModelFacts(
            id=Path(self.pretrained).name,
            architecture=found.architectures[0],
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None),
        )

    @cached_property
    def artifact(self) -> Path:
        """A tenth of the heads, drawn at random."""
        return random_heads(self.facts, 0.1).save(self.folder / "heads.json")

    def one(self) -> dict[str, Arm]:
        """Return both arms on one device, evaluated when first asked for.

        Raises:
            ActHarnessError: they could not be had, and nothing can be compared.
        """
        with self._asking:
            if self._one is None:
                try:
                    self._one = self.evaluated("eval-one", several=False)
                except ActHarnessError as error:
                    self._one = error
        if isinstance(self._one, ActHarnessError):
            raise InputError(f"on one device: {self._one}")
        return self._one

    def evaluated(
        self, name: str, *, several: bool, more: str = "", number: int = 0
    ) -> dict[str, Arm]:
        """Run ``act-harness eval``, both arms."""
        command = [
            *self.runner.launcher(several), "-m", "act_harness", "eval",
            "--model-args", f"pretrained={self.pretrained},dtype={self.dtype}{more}",
            "--artifact", str(self.artifact), "--tasks", self.tasks, "--limit", str(self.limit),
            "--batch-size", "8", "--device", self.runner.device(several, number),
            "--calibrators", "content-free",  # asked by the first process alone
            "--output", str(self.folder / name),
        ]  # fmt: skip
        self.finished(self.runner.run(name, command))
        return arms_in(self.folder / name)

    def finished(self, ran: Ran) -> Ran:
        """Return a run that came to its end.

        Raises:
            InputError: it failed; the message is its own.
        """
        if ran.fault():
            raise InputError(ran.fault())
        return ran

    def search(self, name: str, method: str, *, several: bool, ledgers: str | None = None) -> Path:
        """Run ``act-harness search``; return its artifact."""
        self.finished(self.runner.run(name, self.search_command(name, method, several, ledgers)))
        return self.folder / f"{name}.json"

    def search_command(
        self, name: str, method: str, several: bool, ledgers: str | None = None
    ) -> list[str]:
        """Return the command of a search of a few documents."""
        recipe = write_text(self.folder / f"{method}.yaml", self._recipe(method))
        return [
            *self.runner.launcher(several), "-m", "act_harness", "search", str(recipe),
            "--model-args", f"pretrained={self.pretrained},dtype={self.dtype}",
            "--device", self.runner.device(several),
            "--ledgers", str(self.folder / (ledgers or f"{name}-ledgers")),
            "--output", str(self.folder / f"{name}.json"),
        ]  # fmt: skip

    def _recipe(self, method: str) -> str:
        own = {
            "exhaustive": "chunk_tokens: 256\ntop: {sizes: [2, 4, 8]}\n",
            "gradient": "gradient: {epochs: 6, sizes: [2, 8], criterion: margin}\n",
        }[method]
        return (
            f"name: several\ntasks: [{self.tasks.split(',')[0]}]\nmethod: {method}\n"
            f"samples: {self.samples}\nverify_samples: {self.samples}\n"
            f"judge_samples: {self.samples}\ncontrols: {{random_sets: 2}}\n{own}"
        )

    def seconds(self, name: str) -> float | None:
        """Return how long a run took."""
        ran = self.runner.ran.get(name)
        return None if ran is None else ran.seconds


Check = Callable[[SeveralDevices, str], Row]


def _row(given: SeveralDevices, name: str, found: Difference, *runs: str, note: str = "") -> Row:
    """Return the row of a comparison; ``runs`` are that on one device and that on several."""
    one, several = (given.seconds(run) for run in runs)
    fate = "differs" if found.faults else "same"
    return Row(
        name, fate, found.largest, one, several, "; ".join([*found.faults, note]).strip("; ")
    )


def _compared(given: SeveralDevices, arms: dict[str, Arm], *, split: bool = False) -> Difference:
    exact = given.dtype in ("float32", "float64")
    tolerance = given.tolerance.of_split_sums() if split else given.tolerance
    return compare_arms(given.one(), arms, tolerance, exact=exact)


def _shares(arms: dict[str, Arm]) -> str:
    every = {arm.shares for arm in arms.values()}
    return "requests by process: " + " or ".join(", ".join(map(str, s)) for s in sorted(every))


def _eval(given: SeveralDevices, name: str) -> Row:
    expected, arms = given.one(), given.evaluated("eval-several", several=True)
    found = _compared(given, arms)
    count = given.runner.devices
    lacking = [n for n, arm in arms.items() if len(arm.shares) != count or not min(arm.shares)]
    if lacking or any(len(arm.shares) != 1 for arm in expected.values()):
        found = Difference(found.largest, (*found.faults, "a process had no share"))
    return _row(given, name, found, "eval-one", "eval-several", note=_shares(arms))


def _harness(given: SeveralDevices, name: str, *, arm: str) -> Row:
    """lm-eval's own command line, one arm."""
    expected = given.one()
    run, artifact = f"lm-eval-{arm}", "none" if arm == "baseline" else str(given.artifact)
    command = [
        *given.runner.launcher(True, accelerate=True), *given.runner.lm_eval(),
        "--model", "hf-act", "--model_args",
        f"pretrained={given.pretrained},dtype={given.dtype},artifact={artifact}",
        "--tasks", given.tasks, "--limit", str(given.limit), "--batch_size", "8",
        "--device", given.runner.device(True), "--log_samples",
        "--output_path", str(given.folder / run),
    ]  # fmt: skip
    given.finished(given.runner.run(run, command))
    arms = arms_in(given.folder / run)
    if arms.keys() - expected.keys():
        raise InputError(f"the arm is {next(iter(arms))!r}, expected one of {list(expected)}")
    return _row(given, name, _compared(given, arms), "eval-one", run, note=_shares(arms))


def _placed(given: SeveralDevices, name: str, *, more: str = "", last: bool = False) -> Row:
    """One process that uses other devices, or several that share one model."""
    given.one()
    number = given.runner.devices - 1 if last and not given.runner.cpu else 0
    several = "tp_plan" in more
    arms = given.evaluated(name, several=several, more=more, number=number)
    used = ", ".join(f"{most:.1f}" for most in given.runner.ran[name].memory)
    note = f"GiB in use by GPU: {used}" if used else ""
    found = _compared(given, arms, split=several)
    return _row(given, name, found, "eval-one", name, note=note)


def _tensor_parallel(given: SeveralDevices, name: str) -> Row:
    heads = (given.facts.num_attention_heads, given.facts.num_key_value_heads)
    even = all(number is None or number % given.runner.devices == 0 for number in heads)
    if even:
        return _placed(given, name, more=",tp_plan=auto")
    try:
        given.evaluated(name, several=True, more=",tp_plan=auto")
    except InputError as error:
        refused = given.runner.ran[name].code is not None
        fate = "refused" if refused and str(error).startswith("act-harness") else "failed"
        return Row(name, fate, None, None, given.seconds(name), str(error))
    return Row(name, "failed", None, None, None, f"heads {heads} do not divide; was not refused")


def _search(given: SeveralDevices, name: str, *, method: str) -> Row:
    one = given.search(f"{method}-one", method, several=False)
    several = given.search(f"{method}-several", method, several=True)
    # A search measures each unit in one process; a gradient is a sum over processes.
    tolerance = 1e-3 if method == "gradient" else given.tolerance.absolute
    found = compare_artifacts(one, several, tolerance=tolerance)
    artifact = load_artifact(several)
    rows = len(((artifact.search or {}).get("table") or {}).get("heads", {}).get("rows", ()))
    if not rows:
        found = Difference(found.largest, (*found.faults, "nothing was measured, nor compared"))
    note = f"{artifact.head_count()} heads found, {rows} rows of effects compared"
    return _row(given, name, found, f"{method}-one", f"{method}-several", note=note)


def _generation(given: SeveralDevices, name: str) -> Row:
    arms = {}
    for run, several in (("generation-one", False), ("generation-several", True)):
        command = [
            *given.runner.launcher(several), "-m", "act_harness", "eval", "--model-args",
            f"pretrained={given.pretrained},dtype={given.dtype},"
            f"answers={given.folder / run / 'answers'}",
            "--artifact", str(given.artifact), "--tasks", "mt_bench", "--limit", "4",
            "--apply-chat-template", "--gen-kwargs", "greedy=true,max_gen_toks=24",
            "--batch-size", "1", "--device", given.runner.device(several),
            "--output", str(given.folder / run),
        ]  # fmt: skip
        given.finished(given.runner.run(run, command))
        arms[run] = arms_in(given.folder / run)
    found = compare_arms(
        arms["generation-one"], arms["generation-several"], given.tolerance, exact=True
    )
    note = _shares(arms["generation-several"])
    return _row(given, name, found, "generation-one", "generation-several", note=note)


def _killed(given: SeveralDevices, name: str) -> Row:
    """Kill the last process of a search, and start the search again."""
    one, rank = given.folder / "exhaustive-one.json", given.runner.devices - 1
    if not one.is_file():
        given.search("exhaustive-one", "exhaustive", several=False)
    killed: list[float] = []

    def kill(process: Popen[bytes]) -> None:
        kill_once_written(
            process, rank=rank, folder=given.folder / "killed-ledgers", lines=2,
            seconds=given.runner.seconds,
        )  # fmt: skip
        killed.append(time.monotonic())

    command = given.search_command("killed", "exhaustive", several=True)
    ran = given.runner.run("killed", command, meanwhile=kill)
    took = time.monotonic() - killed[0]
    text = ran.log.read_text(encoding="utf-8", errors="replace")
    said = own_lines(text)
    again = given.search("again", "exhaustive", several=True, ledgers="killed-ledgers")
    found = compare_artifacts(one, again, tolerance=given.tolerance.absolute)
    faults = list(found.faults)
    if ran.code in (0, None):
        faults.append("the killed search did not end" if ran.code is None else "it ended well")
    if len(said) > rank:
        faults.append(f"{len(said)} lines were said")
    if "continuing" not in (given.folder / "again.log").read_text(encoding="utf-8"):
        faults.append("it did not continue")
    if text.count("Traceback") > 1:  # the launcher's own
        faults.append("tracebacks were printed")
    note = f"all ended {took:.1f} s after the kill: {said[0] if said else 'without a word'}"
    return _row(
        given, name, Difference(found.largest, tuple(faults)), "exhaustive-one", "again", note=note
    )


CHECKS: dict[str, Check] = {
    "eval": _eval,
    "lm-eval-baseline": partial(_harness, arm="baseline"),
    "lm-eval-act": partial(_harness, arm="act"),
    "parallelize": partial(_placed, more=",parallelize=True"),
    "device-map": partial(_placed, more=",parallelize=True,device_map=auto"),
    "last-device": partial(_placed, last=True),
    "tensor-parallel": _tensor_parallel,
    "search": partial(_search, method="exhaustive"),
    "gradient": partial(_search, method="gradient"),
    "generation": _generation,
    "kill": _killed,
}
"""By name, the most wanted first."""


def checked(name: str, given: SeveralDevices) -> Row:
    """Do one check; whatever goes wrong is its row."""
    try:
        return CHECKS[name](given, name)
    except ActHarnessError as error:
        return Row(name, "failed", None, None, None, str(error))
