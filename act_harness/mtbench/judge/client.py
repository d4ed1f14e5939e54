"""One call to the judge: what was said, or why nothing was.

The ``openai`` client speaks to any compatible server; its own retries are off, because they would
not be counted, and ``tenacity`` repeats instead. The answer is taken as raw text and checked here:
a proxy's HTML page with status 200 must not end as an exception half-way through a run.

The key is held by the client object alone. Every text that came from outside is searched for it
before it is kept, because servers quote requests in their errors.

FastChat takes the first ``[[number]]`` of a verdict, whatever its size, and falls back to single
brackets. Here a verdict counts only if it is unambiguous, because a wrong number is worse than a
missing one, which is counted and asked for again.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from act_harness.errors import InfrastructureError, InputError, ResultError, install_command
from act_harness.mtbench.judge.settings import NO_KEY, JudgeSettings
from act_harness.support import reading

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["Client", "Preference", "Reply", "preference_of", "rating_of"]

Preference = Literal["A", "B", "tie"]

_FATAL = {401: "refused the key", 403: "forbids the call", 404: "knows no such model or address"}
_REDACTED = "[key]"
_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_PREFERENCE = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LOOKS_LIKE_A_KEY = re.compile(r"\bsk-[\w*-]{6,}")
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?!\[key\])[\w.~+/=-]{6,}")
_LONGEST_REASON = 200
_UNREACHABLE = "connection failed"


@dataclass(frozen=True)
class Reply:
    """How asking for one judgment ended."""

    rating: float | None
    """From 1 to 10; None: missing."""
    verdict: str
    """The last verdict's text; empty if none came."""
    reason: str
    """Why the rating is missing; empty otherwise."""
    calls: int
    """Calls made for it."""
    prompt_tokens: int
    """Tokens as the server counted them, over all calls; 0 if it does not say."""
    completion_tokens: int

    @property
    def unreachable(self) -> bool:
        """Whether the last call never came through."""
        return self.reason.startswith(_UNREACHABLE)


class _TryAgainError(Exception):
    """A call that may succeed when repeated."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _GiveUpError(Exception):
    """A call that would fail the same way again, for this prompt only."""


class Client:
    """The judge behind one address. Safe to use from several threads."""

    def __init__(self, settings: JudgeSettings, *, stop: threading.Event | None = None) -> None:
        """Prepare; nothing is sent.

        Args:
            settings: who is asked, and how patiently.
            stop: when set, pauses end at once and nothing is repeated.

        Raises:
            InputError: the client library is not installed.
            RecipeError: there is no key where one is needed.
        """
        try:
            import openai
            import tenacity
        except ModuleNotFoundError as error:
            raise InputError(
                f"judging needs {error.name}, which is not installed; run: "
                f"{install_command('mtbench')}"
            ) from None
        self._openai, self._tenacity = openai, tenacity
        self._settings = settings
        self._stop = stop or threading.Event()
        self._refused: InfrastructureError | None = None
        self._key = settings.api_key()
        # A placeholder such as "none" is a word that verdicts may well hold.
        self._secret = self._key if self._key != NO_KEY else ""
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=0,
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def redact(self, text: str) -> str:
        """Return a text without the key, or parts of one that a server shows."""
        if self._secret:  # as it is, and as a server's JSON or a library's repr shows it
            for shown in (self._secret, json.dumps(self._secret)[1:-1], repr(self._secret)[1:-1]):
                text = text.replace(shown, _REDACTED)
        text = _BEARER.sub(rf"\1{_REDACTED}", text)
        return _LOOKS_LIKE_A_KEY.sub(_REDACTED, text)

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Ask for one judgment, with retries.

        Raises:
            InfrastructureError: the server refuses every call (key, model, quota): going on would
                be of no use.
        """
        if self._refused is not None:
            raise self._refused
        state = _State()
        retrying = self._tenacity.Retrying(
            stop=self._tenacity.stop_any(
                self._tenacity.stop_after_attempt(self._settings.retries + 1),
                self._tenacity.stop_when_event_set(self._stop),
            ),
            wait=self._pause,
            retry=self._tenacity.retry_if_exception_type(_TryAgainError),
            sleep=self._tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            retrying(self._attempt, messages, state)
        except (_TryAgainError, _GiveUpError) as error:
            return state.reply(None, str(error))
        except InfrastructureError as error:
            self._refused = error  # other threads need not find out for themselves
            self._stop.set()
            raise
        return state.reply(state.rating, "")

    def _pause(self, retry_state: RetryCallState) -> float:
        """Return the seconds to wait: what the server asks for, else 1, 2, 4, ... ; bounded."""
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.wait if isinstance(error, _TryAgainError) else None
        wait = 2.0 ** (retry_state.attempt_number - 1) if asked is None else asked
        return min(max(wait, 0.0), self._settings.max_wait)

    def _attempt(self, messages: list[dict[str, str]], state: _State) -> None:
        state.calls += 1
        body = parse_reply(self._call(messages))
        usage = body.get("usage")
        if isinstance(usage, dict):
            state.prompt_tokens += _count(usage.get("prompt_tokens"))
            state.completion_tokens += _count(usage.get("completion_tokens"))
        text, finish = _content(body)
        state.verdict = self.redact(text)
        state.rating, reason = rating_of(text)
        if state.rating is None:
            cut = "; the verdict was cut off" if finish == "length" else ""
            raise _TryAgainError(f"{reason}{cut}", wait=0.0)

    def _call(self, messages: list[dict[str, str]]) -> str:
        """Return the body of a reply with status 200."""
        openai, settings = self._openai, self._settings
        # Half a surrogate pair, which an answer can hold, cannot be sent: the request is UTF-8.
        sent = [
            {role: text.encode("utf-8", "replace").decode("utf-8") for role, text in one.items()}
            for one in messages
        ]
        fields: dict[str, Any] = {"model": settings.model, "messages": sent}
        if settings.temperature is not None:
            fields["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            fields["max_tokens"] = settings.max_tokens
        if settings.extra_body:
            fields["extra_body"] = settings.extra_body
        try:
            raw = self._client.chat.completions.with_raw_response.create(**fields)
            return str(raw.text() if callable(raw.text) else raw.text)
        except openai.APITimeoutError:
            raise _TryAgainError(f"no answer within {settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise _TryAgainError(f"{_UNREACHABLE}: {self._short(cause or error)}") from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIError as error:
            raise _TryAgainError(f"unusable reply: {self._short(error)}") from None

    def _refusal(self, error: Any) -> Exception:  # noqa: ANN401 - openai.APIStatusError
        status = int(error.status_code)
        said = f"status {status}: {self._short(error.message)}"
        if status in _FATAL or getattr(error, "code", None) == "insufficient_quota":
            what = _FATAL.get(status, "has no quota left")
            return InfrastructureError(
                f"the judge's server {what} ({said}); check --model, --base-url and the key in "
                f"{self._settings.key_variable}; judgments so far are kept"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return _TryAgainError(said, _retry_after(error.response.headers))
        return _GiveUpError(said)

    def _short(self, error: object) -> str:
        text = " ".join(self.redact(str(error)).split()) or type(error).__name__
        return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


@dataclass
class _State:
    """What the calls for one judgment have brought so far."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    verdict: str = ""
    rating: float | None = None

    def reply(self, rating: float | None, reason: str) -> Reply:
        return Reply(
            rating, self.verdict, reason, self.calls, self.prompt_tokens, self.completion_tokens
        )


def parse_reply(text: str) -> dict[str, Any]:
    """Read a reply's body; whatever else a server sends is one more try, never the run's end."""
    try:
        body = reading.parse_json(text, source="the reply", lenient=True)
    except ResultError:
        raise _TryAgainError("the reply is not JSON") from None
    if not isinstance(body, dict):
        raise _TryAgainError("the reply is no chat completion")
    return body


def _content(body: dict[str, Any]) -> tuple[str, str | None]:
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise _TryAgainError("the reply is no chat completion") from None
    if not isinstance(text, str):
        raise _TryAgainError("the reply holds no text")
    return text, choice.get("finish_reason")


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _retry_after(headers: Any) -> float | None:  # noqa: ANN401 - the client library's headers
    """Return the seconds of a Retry-After header; a date there counts as not given."""
    try:
        return float(headers.get("retry-after"))
    except (TypeError, ValueError):
        return None


# -- reading a verdict ----------------------------------------------------------------------------


def rating_of(verdict: str) -> tuple[float | None, str]:
    """Return the rating, or None with the reason why there is none.

    Accepted is a number from 1 to 10 in double brackets; repeating the same one is harmless,
    two different ones are ambiguous.
    """
    found = {float(text) for text in _RATING.findall(verdict)}
    if not found:
        return None, "no rating in double brackets"
    if len(found) > 1:
        return None, "several different ratings"
    rating = found.pop()
    if not 1.0 <= rating <= 10.0:
        return None, "rating outside 1 to 10"
    return rating, ""


def preference_of(verdict: str) -> Preference | None:
    """Return which answer a pairwise verdict prefers; None where it does not say exactly one."""
    found = set(_PREFERENCE.findall(verdict))
    if len(found) != 1:
        return None
    letter = found.pop()
    return "A" if letter == "A" else "B" if letter == "B" else "tie"
