"""Records of Every Eval Ever (schema 0.2.2): one file for each arm and task or group of tasks.

The schema is the EvalEval Coalition's (``evaleval/every_eval_ever`` on GitHub, package
``every-eval-ever``). What is written here fits its release 0.3.0 as well, whose validator asks for
more. Free fields hold texts only. The calibrated arm is a model of its own,
``BASE__act-NAME-HASH``, so that nobody takes its score for the base model's; the paired difference
stands beside its scores.

Not here: records of single documents, which would publish the texts of benchmarks.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from act_harness._version import __version__
from act_harness.evidence.comparison import Comparison, Row
from act_harness.publication.evaluation import Arm, Evaluation, is_hub_id
from act_harness.support.atomic import canonical_json
from act_harness.support.places import file_name
from act_harness.support.provenance import sha256_json

__all__ = ["SCHEMA_VERSION", "every_eval_ever_records"]

SCHEMA_VERSION = "0.2.2"

_UNIT = (0.0, 1.0)
_BOUNDS = {
    "acc": _UNIT, "acc_norm": _UNIT, "acc_mutual_info": _UNIT, "exact_match": _UNIT, "em": _UNIT,
    "f1": _UNIT, "mcc": (-1.0, 1.0),
}  # fmt: skip
"""Least and greatest value where a metric's definition fixes both."""

_KNOWN_METRICS = {"acc": "accuracy", "exact_match": "exact-match", "em": "exact-match", "f1": "f1"}
"""lm-eval's name to the registry's; others are named under lm-eval."""


def every_eval_ever_records(
    evaluation: Evaluation, *, organization: str | None, created: int
) -> dict[str, dict[str, Any]]:
    """Return the records of an evaluation by their paths, ``data/COLLECTION/OWNER/NAME/UUID.json``.

    Args:
        evaluation: What was evaluated.
        organization: Who evaluated it; None: not said.
        created: When the records are made, seconds since 1970.

    Raises:
        ResultError: The model has no name that others can look up.
    """
    records: dict[str, dict[str, Any]] = {}
    for arm in evaluation.arms:
        writer = _Writer(arm, evaluation.comparisons.get(arm.seed), organization, created)
        records.update(writer.records())
    return records


@dataclass(frozen=True)
class _Writer:
    """Writes one arm's records."""

    arm: Arm
    comparison: Comparison | None
    organization: str | None
    created: int

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield path and record of every collection that has a score."""
        for collection, names in _collections(self.arm).items():
            results = [one for name in names for one in self._results(name)]
            if not results:
                continue
            content = {"model": self.arm.model_id, "seed": self.arm.seed, "results": results}
            name = uuid.UUID(bytes=bytes.fromhex(sha256_json(content))[:16], version=4)
            folder = file_name(collection)
            folder = f"{folder}-task" if folder.lower() == "data" else folder
            yield (
                f"data/{folder}/{self.arm.model_id}/{name}.json",
                self._record(collection, results),
            )

    def _record(self, collection: str, results: list[dict[str, Any]]) -> dict[str, Any]:
        data, seed = self.arm.run.data, self.arm.seed
        end = "" if seed is None else f"/fewshot-seed-{seed}"
        record = {
            "schema_version": SCHEMA_VERSION,
            "evaluation_id": f"{collection}/{self.arm.model_id}/{self.created}{end}",
            "evaluation_timestamp": self._evaluated,
            "retrieved_timestamp": str(self.created),
            "source_metadata": self._source(),
            "eval_library": {
                "name": "lm_eval",
                "version": str(data.get("lm_eval_version") or "unknown"),
                "additional_details": {"act_harness": self._own_version},
            },
            "model_info": self._model(),
            "evaluation_results": results,
        }
        return {key: value for key, value in record.items() if value is not None}

    @cached_property
    def _evaluated(self) -> str | None:
        date = self.arm.run.data.get("date")
        return str(int(date)) if isinstance(date, (int, float)) else None

    @cached_property
    def _own_version(self) -> str:
        noted = self.arm.run.data.get("act_harness")
        found = noted.get("provenance") if isinstance(noted, Mapping) else None
        return str((found or {}).get("act_harness") or __version__)

    def _source(self) -> dict[str, Any]:
        developer = self.arm.base_model.partition("/")[0]
        named = self.organization
        own = named is not None and named.casefold() == developer.casefold()
        return {
            "source_name": "act-harness",
            "source_type": "evaluation_run",
            "source_organization_name": named or "unknown",
            "evaluator_relationship": "first_party" if own else "third_party" if named else "other",
            **_texts("additional_details", {"wandb_run": self.arm.tracked_at}),
        }

    def _model(self) -> dict[str, Any]:
        arm, config = self.arm, self.arm.run.data.get("config", {})
        facts = arm.record.get("model")
        facts = facts if isinstance(facts, Mapping) else {}
        # lm-eval asks the hub for this hash: a model that has one can be had there.
        public = "open_weights" if config.get("model_sha") and arm.named is None else "unknown"
        details = {
            "deployment_type": "self_deployed",
            "model_availability": public,
            "attention": "calibrated (ACT)" if arm.calibrated else "as trained",
            "base_model": arm.base_model,
            "dtype": facts.get("dtype") or config.get("model_dtype"),
            # Of a folder lm-eval notes its own default, which is no revision.
            "revision": facts.get("revision")
            or (config.get("model_sha") and config.get("model_revision")),
            "sha": config.get("model_sha"),
            "num_parameters": config.get("model_num_parameters"),
            "weights_sha256": facts.get("weights_sha256"),
        }
        if arm.calibrated:
            details |= {
                "artifact": arm.record.get("artifact"),
                "artifact_sha256": arm.record.get("artifact_sha256"),
                "calibrated_heads": arm.record.get("heads"),
                "calibration": canonical_json(arm.record.get("calibration")),
            }
        info: dict[str, Any] = {
            "name": arm.model_id.partition("/")[2],
            "id": arm.model_id,
            "developer": arm.base_model.partition("/")[0],
            **_texts("additional_details", details),
        }
        if arm.record or config.get("model") in ("hf", "hf-act"):
            version = str(arm.run.data.get("transformers_version") or "unknown")
            info["inference_engine"] = {"name": "transformers", "version": version}
        return info

    def _results(self, name: str) -> Iterator[dict[str, Any]]:
        run = self.arm.run
        for metric, kind in run.metrics(name):
            score, better = run.score(name, metric, kind), run.higher_is_better(name, metric)
            if score is None or better is None:
                continue
            plain = kind in ("none", "")
            config: dict[str, Any] = {
                "metric_id": _KNOWN_METRICS.get(metric, f"lm-evaluation-harness.{metric}"),
                "metric_name": metric,
                "lower_is_better": not better,
            }
            low, high = _BOUNDS.get(metric, (1.0, 0.0))
            if low <= score <= high:  # a task may report percent under the same name
                config |= {"score_type": "continuous", "min_score": low, "max_score": high}
            result = {
                "evaluation_result_id": f"{name}:{metric}" if plain else f"{name}:{metric}:{kind}",
                "evaluation_name": name if plain else f"{name}/{kind}",
                "source_data": self._data(name),
                "evaluation_timestamp": self._evaluated,
                "metric_config": config,
                "score_details": self._score(name, metric, kind, score),
                "generation_config": self._generation(name),
            }
            yield {key: value for key, value in result.items() if value is not None}

    def _data(self, name: str) -> dict[str, Any]:
        task = self._task(name)
        where = str(task.get("dataset_path") or "")
        details = {
            "config": task.get("dataset_name"),
            "tasks": ", ".join(self.arm.run.leaves(name)) if name in self.arm.run.groups else None,
            "task_version": self.arm.run.data.get("versions", {}).get(name),
            "task_hash": self.arm.run.data.get("task_hashes", {}).get(name),
        }
        found: dict[str, Any] = {"dataset_name": name, **_texts("additional_details", details)}
        if not is_hub_id(where):
            return {**found, "source_type": "other"}
        found |= {"source_type": "hf_dataset", "hf_repo": where}
        split = task.get("test_split") or task.get("validation_split")
        whole = self.arm.run.data.get("n-samples", {}).get(name, {}).get("original")
        more = {"hf_split": split, "samples_number": whole}
        return found | {key: value for key, value in more.items() if value}

    def _score(self, name: str, metric: str, kind: str, score: float) -> dict[str, Any]:
        run = self.arm.run
        values = run.data["results"][name]
        aggregation = {
            one.get("metric"): one.get("aggregation")
            for one in self._task(name).get("metric_list") or ()
            if isinstance(one, Mapping)
        }.get(metric)
        uncertainty: dict[str, Any] = {}
        error = run.score(name, f"{metric}_stderr", kind)
        if error is not None:
            method = {"method": "analytic"} if aggregation == "mean" else {}
            uncertainty["standard_error"] = {"value": error, **method}
        counted = run.data.get("n-samples", {}).get(name, {}).get("effective")
        counted = counted or values.get("sample_len")
        if isinstance(counted, int):
            uncertainty["num_samples"] = counted
        found: dict[str, Any] = {"score": score}
        if uncertainty:
            found["uncertainty"] = uncertainty
        if self.arm.calibrated and self.comparison is not None:
            for row in self.comparison.rows:
                if (row.name, row.metric, row.filter) == (name, metric, kind):
                    found |= _texts("details", _paired(row, self.comparison))
        return found

    def _generation(self, name: str) -> dict[str, Any] | None:
        task, data = self._task(name), self.arm.run.data
        given = task.get("generation_kwargs")
        given = given if isinstance(given, Mapping) else {}
        numbers = {key: given.get(key) for key in ("temperature", "top_p", "top_k")}
        arguments = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
        most = given.get("max_gen_toks")
        if isinstance(most, int) and most > 0:
            arguments["max_tokens"] = most
        details = {
            "num_fewshot": data.get("n-shot", {}).get(name),
            "fewshot_seed": self.arm.seed,
            "chat_template_sha": data.get("chat_template_sha"),
            "limit": data.get("config", {}).get("limit"),
        }
        found = {"generation_args": arguments} if arguments else {}
        return {**found, **_texts("additional_details", details)} or None

    def _task(self, name: str) -> Mapping[str, Any]:
        found = self.arm.run.data.get("configs", {}).get(name)
        return found if isinstance(found, Mapping) else {}


def _paired(row: Row, comparison: Comparison) -> dict[str, Any]:
    """Return what is known of a calibrated score beside its baseline's, on the same documents."""
    found: dict[str, Any] = {
        "paired_baseline_id": comparison.a.model,
        "paired_baseline_score": row.score_a,
        "paired_verdict": row.verdict if row.tested else "not tested",
    }
    if row.result is None or not row.tested:
        return found
    result = row.result
    found |= {
        "paired_difference": result.difference,
        "paired_interval_low": result.interval.low,
        "paired_interval_high": result.interval.high,
        "paired_interval_confidence": result.confidence,
        "paired_documents": result.documents,
        "paired_test": result.test,
        "paired_p_value": result.p_value,
        "paired_p_value_adjusted": row.p_adjusted,
    }
    if result.flips is not None:
        found |= {"paired_gained": result.flips.gained, "paired_lost": result.flips.lost}
    return found


def _collections(arm: Arm) -> dict[str, list[str]]:
    """Return what stands in one record: a group with all below it, or a task of no group."""
    parents: dict[str, str] = {}
    for group, names in arm.run.data.get("group_subtasks", {}).items():
        for name in names:
            parents.setdefault(name, group)
    found: dict[str, list[str]] = {}
    for name in arm.run.data["results"]:
        top, seen = name, {name}
        while top in parents and parents[top] not in seen:
            top = parents[top]
            seen.add(top)
        found.setdefault(top, []).append(name)
    return found


def _texts(key: str, values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return a free field, whose values are texts; nothing where none is known."""
    found = {name: str(value) for name, value in values.items() if value not in (None, "")}
    return {key: found} if found else {}
