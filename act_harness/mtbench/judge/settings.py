"""What a judge run is asked to do; the command line and a YAML file fill the same fields.

The API key is no setting: it is read from the environment when the first call is made and kept
nowhere else.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from act_harness.calibration import validation_line
from act_harness.errors import RecipeError, unknown_name
from act_harness.support import reading

__all__ = ["NO_KEY", "JudgeSettings", "load_judge_settings"]

NO_KEY = "none"
"""What is sent as a key to a server that needs none."""

_KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeSettings(BaseModel):
    """Which answers are judged, by whom, and how patiently."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    paths: tuple[Path, ...] = Field(min_length=1)
    """Output folders (or samples files) of ``mt_bench`` runs; every arm found there is judged."""
    model: str = Field(min_length=1)
    """Name of the judge, as its server knows it."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server, with ``/v1``; None: OpenAI's own."""
    api_key_env: str | None = None
    """Environment variable that holds the key, or ``none``. None: ``OPENAI_API_KEY`` where it is
    set; servers of one's own mostly need no key."""
    allow_insecure_key: bool = False
    """Send the key to another machine without encryption (``http://``)."""
    output: Path | None = None
    """Folder for judgments and scores; None: ``mt_bench_judge`` in the first path."""
    judge_prompts: Path | None = None
    """Judge prompts in FastChat's format (``judge_prompts.jsonl``); None: this package's own."""
    references: Path | None = None
    """Reference answers in FastChat's format; None: those of the dataset."""
    allow_missing_references: bool = False
    """Judge a question of a reference-guided category without its reference, and count it."""
    rejudge: int = Field(default=1, ge=1)
    """Judgments of each answer; a score is their mean."""
    temperature: float | None = Field(default=0.0, ge=0)
    """Temperature of the judge; None: not sent."""
    max_tokens: int | None = Field(default=2048, gt=0)
    """Most tokens of a verdict; None: not sent."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, for example ``{"max_completion_tokens": 2048}``."""
    concurrency: int = Field(default=4, ge=1, le=256)
    """Calls under way at the same time."""
    retries: int = Field(default=3, ge=0, le=20)
    """Further calls after a failure or a verdict without a rating, for each judgment."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds until a call counts as failed."""
    max_wait: float = Field(default=60.0, ge=0)
    """Longest pause before a further call in seconds, also where the server asks for more."""
    max_failure_rate: float = Field(default=0.02, ge=0, le=1)
    """Share of missing judgments from which on the run counts as failed."""
    price_input: float | None = Field(default=None, ge=0)
    """Price of a million input tokens, in any currency; for the estimate."""
    price_output: float | None = Field(default=None, ge=0)
    """Price of a million output tokens."""
    dry_run: bool = False
    """Stop after the estimate, before the first call."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the intervals."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of the resampling behind the intervals."""

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            # It would end up in caches and reports; the value is not repeated here either.
            raise ValueError("it must hold no user name, password or query; put the key into the "
                             "environment")  # fmt: skip
        return value.rstrip("/")

    @property
    def output_folder(self) -> Path:
        """Where judgments and scores are written."""
        if self.output is not None:
            return self.output
        first = self.paths[0]
        return (first if first.is_dir() else first.parent) / "mt_bench_judge"

    @property
    def key_variable(self) -> str:
        """The environment variable of the key, for messages."""
        return self.api_key_env or _KEY_VARIABLE

    def api_key(self) -> str:
        """Return the key from the environment; a placeholder for servers that need none.

        Raises:
            RecipeError: There is no key where one was named or OpenAI itself is asked, it is no
                key, or it would go to another machine unencrypted.
        """
        if (self.api_key_env or "").lower() == NO_KEY:
            return NO_KEY
        name = self.key_variable
        key = os.environ.get(name, "")
        if not key.strip():
            if self.api_key_env is not None:
                raise RecipeError(
                    f"no API key: {name}, which --api-key-env names, is not set; set it, or give "
                    "--api-key-env none for a server that needs no key"
                )
            if self.base_url is None:
                raise RecipeError(
                    f"no API key: set {name}, or give --base-url of a server of your own"
                )
            return NO_KEY
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RecipeError(
                f"the API key in {name} holds a blank, a line break or a letter that no key has "
                f"({len(key)} characters); set it again without"
            )
        if not (self.allow_insecure_key or self._is_private()):
            raise RecipeError(
                f"the API key in {name} would go unencrypted to {self.base_url}; use https, give "
                "--api-key-env none if that server needs no key, or --allow-insecure-key"
            )
        return key

    def _is_private(self) -> bool:
        """Whether nobody between here and the server can read what is sent."""
        parts = urlsplit(self.base_url or "https:")
        if parts.scheme == "https" or parts.hostname == "localhost":
            return True
        try:
            return ipaddress.ip_address(parts.hostname or "").is_loopback
        except ValueError:
            return False

    def judge_identity(self) -> dict[str, Any]:
        """Return what decides a verdict beside the prompt."""
        return {
            "model": self.model,
            "base_url": self.base_url,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "extra_body": self.extra_body,
        }


def load_judge_settings(path: Path | None = None, **overrides: Any) -> JudgeSettings:  # noqa: ANN401
    """Build settings from a YAML file of the fields, options over it; None means not given.

    Raises:
        RecipeError: the file cannot be read, or a setting is unknown, missing or out of range.
    """
    given: dict[str, Any] = {}
    if path is not None:
        given = reading.read_yaml(path, error=RecipeError, advice="check --config") or {}
        if not isinstance(given, dict):
            raise RecipeError(
                f"judge settings {path}: found a {type(given).__name__}, expected settings and "
                "their values"
            )
    given.update({name: value for name, value in overrides.items() if value is not None})
    for name in given:
        if name not in JudgeSettings.model_fields:
            fields = JudgeSettings.model_fields
            said = unknown_name(f"judge setting {name!r}", name, fields, listed=False)
            if not said.endswith("?"):
                said += "; see `act-harness judge --help` for those there are"
            raise RecipeError(said)
    try:
        return reading.validated(JudgeSettings, given)
    except ValidationError as error:
        # Of an address the value is left out: a password would be printed.
        raise RecipeError(f"judge setting {validation_line(error)}") from None
