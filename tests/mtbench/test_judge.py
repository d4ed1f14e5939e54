"""The judge from end to end, against a server in this process that can misbehave."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mtbench_runs import doc, graded, write_run
from mtbench_server import Say, serving

from act_harness.errors import InfrastructureError, InputError, RecipeError, ResultError
from act_harness.mtbench.judge import JudgeSettings, judge, summary, track_outcome
from act_harness.mtbench.judge.client import Client

pytest.importorskip("openai")
pytest.importorskip("tenacity")

KEY = "s3cret-key-of-the-test"


@pytest.fixture(autouse=True)
def bare(monkeypatch, request):
    """No key from outside, and no time spent on pictures where they are not looked at."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def no_picture(*_, **__):
        raise InputError("no matplotlib")

    if "pictures" not in request.node.name:
        monkeypatch.setattr(summary, "category_bars", no_picture)


def by_quality(prompt, times):
    """Grade by the last mark in the prompt: the answer that is judged stands last."""
    marks = re.findall(r"QUALITY=([\d.]+)\.", prompt)
    return Say(f"It is what it is. Grade: [[{marks[-1]}]]")


def ask(server, folder, **more):
    fields = {"max_wait": 0.0, "concurrency": 4, "timeout": 10.0, **more}
    settings = JudgeSettings(paths=(folder,), model="judge", base_url=server.url, **fields)
    return judge(settings, announce=lambda text: None, progress=False)


def one_question(tmp_path):
    write_run(tmp_path, [(doc(81), graded(5, 6))])
    return tmp_path


def two_arms(tmp_path):
    """Three questions of two categories; the second arm is 1 better wherever it differs."""
    rows = [doc(81), doc(82), doc(131, "extraction")]
    base = [graded(4, 2), graded(6, 8), graded(10, 6)]
    other = [graded(5, 3), graded(6, 8), graded(10, 7)]
    write_run(tmp_path / "baseline", list(zip(rows, base, strict=True)))
    write_run(tmp_path / "act", list(zip(rows, other, strict=True)), arm="few", sha="ab" * 32)
    return tmp_path


def test_scores_and_difference_are_those_of_a_calculation_by_hand(tmp_path):
    with serving(by_quality) as server:
        outcome = ask(server, two_arms(tmp_path))
    base, other = outcome.arms
    assert (base.arm, other.arm) == ("baseline", "few")
    assert base.overall.mean == pytest.approx((4 + 2 + 6 + 8 + 10 + 6) / 6)
    assert base.turns[1].mean == pytest.approx(20 / 3)
    assert base.turns[2].mean == pytest.approx(16 / 3)
    assert base.categories["writing"].mean == pytest.approx(20 / 4)
    assert base.categories["extraction"].mean == pytest.approx(8)
    assert base.categories["extraction"].low is None  # one question has no interval
    assert other.overall.mean == pytest.approx(39 / 6)
    assert (base.overall.questions, base.overall.answers) == (3, 6)
    assert base.overall.low < base.overall.mean < base.overall.high
    found = {difference.what: difference.result for difference in outcome.differences}
    assert found["overall"].difference == pytest.approx(3 / 6)
    assert found["overall"].clusters == 3
    assert found["turn 2"].difference == pytest.approx(2 / 3)
    assert found["writing"].difference == pytest.approx(2 / 4)
    assert "extraction" not in found
    assert outcome.failure_rate == 0
    assert outcome.exit_code == 0
    # Both arms answered question 82 and turn 1 of 131 alike: three judgments are shared.
    assert server.calls == outcome.calls == 12 - 3


def test_files_say_the_same_and_hold_the_pictures(tmp_path):
    with serving(by_quality) as server:
        outcome = ask(server, two_arms(tmp_path), output=tmp_path / "scores")
    document = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert document["arms"][0]["overall"]["mean"] == outcome.arms[0].overall.mean
    assert document["arms"][1]["missing"]["1"] == {
        "judgments": 3, "missing": 0, "rate": 0.0, "reasons": {},
    }  # fmt: skip
    text = (tmp_path / "scores" / "scores.md").read_text()
    assert "| baseline | overall | 6.00 |" in text
    assert "| few - baseline | overall | +0.50 |" in text
    assert (tmp_path / "scores" / "categories.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "scores" / "radar.png").exists()  # two categories make no shape


def test_eighty_questions_are_160_judgments_and_a_second_run_asks_for_none(tmp_path):
    write_run(tmp_path, [(doc(81 + n), graded(1 + n % 10, 5)) for n in range(80)])
    with serving(by_quality) as server:
        first = ask(server, tmp_path, concurrency=8)
        again = ask(server, tmp_path)
        assert server.calls == first.calls == 160
    assert again.calls == 0
    assert again.arms == first.arms
    assert first.arms[0].turns[1].mean == pytest.approx(5.5)
    assert sum(count.judgments for count in first.arms[0].missing.values()) == 160


FAULTS = {
    "429": (Say(status=429, body='{"error": {"message": "slow down"}}'), "status 429"),
    "500": (Say(status=500, body="oops"), "status 500"),
    "html": (Say(body="<html>a proxy</html>"), "the reply is not JSON"),
    "list": (Say(body="[1]"), "the reply is no chat completion"),
    "no choices": (Say(body='{"choices": []}'), "the reply is no chat completion"),
    "null text": (
        Say(body='{"choices": [{"message": {"content": null}}]}'), "the reply holds no text",
    ),
    "half an answer": (Say(half=True), "connection failed"),
    "cut verdict": (
        Say("It is", finish="length"), "no rating in double brackets; the verdict was cut off",
    ),
    "too high": (Say("Grade: [[11]]"), "rating outside 1 to 10"),
    "zero": (Say("Grade: [[0]]"), "rating outside 1 to 10"),
    "no rating": (Say("It is good: 7 of 10."), "no rating in double brackets"),
    "two ratings": (Say("[[3]] or rather [[8]]"), "several different ratings"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_lasting_fault_is_missing_after_bounded_retries(tmp_path, name):
    fault, reason = FAULTS[name]

    def second_turn_fails(prompt, times):
        return fault if "second part" in prompt else Say("[[4]]")

    with serving(second_turn_fails, limit=20) as server:
        outcome = ask(server, one_question(tmp_path), retries=2)
    assert server.calls == 1 + 3
    arm = outcome.arms[0]
    assert arm.overall.mean == 4  # not 0, and not dragged down by what is missing
    assert arm.turns[2] is None
    assert arm.missing[1].missing == 0
    assert (arm.missing[2].judgments, arm.missing[2].missing) == (1, 1)
    assert list(arm.missing[2].reasons) == [reason]
    assert outcome.failure_rate == 0.5
    assert outcome.exit_code == 3
    assert "FAILED: 50.0% of the judgments are missing" in outcome.summary()


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_ends_as_a_rating(tmp_path, name):
    fault = FAULTS[name][0]
    with serving(lambda prompt, times: fault if times == 0 else Say("[[6.5]]")) as server:
        outcome = ask(server, one_question(tmp_path), retries=1)
    assert server.calls == 4
    assert outcome.arms[0].overall.mean == 6.5
    assert outcome.exit_code == 0


def test_a_time_out_is_a_fault_like_any_other(tmp_path):
    given_up = threading.Event()

    def behave(prompt, times):
        if times == 0:
            given_up.wait(120)
        return Say()

    with serving(behave) as server:  # the time-out is for the second replies on a busy machine
        outcome = ask(server, one_question(tmp_path), timeout=3.0, retries=1)
        given_up.set()
    assert server.calls == 4
    assert outcome.arms[0].overall.mean == 7


def test_a_refused_prompt_is_not_asked_for_again(tmp_path):
    body = '{"error": {"message": "context too long"}}'
    with serving(lambda prompt, times: Say(status=400, body=body)) as server:
        outcome = ask(server, one_question(tmp_path), retries=5)
    assert server.calls == 2
    assert outcome.failure_rate == 1
    assert outcome.arms[0].overall is None


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everything_ends_the_run(tmp_path, status):
    with (
        serving(lambda prompt, times: Say(status=status, body="{}")) as server,
        pytest.raises(InfrastructureError, match=f"status {status}") as caught,
    ):
        ask(server, one_question(tmp_path), concurrency=1)
    assert server.calls == 1
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_ends_the_run_soon(tmp_path):
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(40)])
    with serving() as server:
        pass  # its port is free again, so nothing answers there
    with pytest.raises(InfrastructureError, match=f"nothing answers at {server.url}") as caught:
        ask(server, tmp_path, concurrency=2, retries=1)
    assert "\n" not in str(caught.value)
    kept = (tmp_path / "mt_bench_judge" / "judgments.jsonl").read_text().splitlines()
    assert len(kept) == 8 + 2


class RecordingEvent(threading.Event):
    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return False


@pytest.mark.parametrize(("asked", "want"), [("3", 3.0), ("900", 20.0), ("soon", 1.0)])
def test_retry_after_is_honoured_up_to_the_longest_wait(asked, want):
    slow = Say(status=429, body="{}", headers={"retry-after": asked})
    event = RecordingEvent()
    with serving(lambda prompt, times: slow if times == 0 else Say()) as server:
        settings = JudgeSettings(paths=(".",), model="m", base_url=server.url, max_wait=20.0)
        client = Client(settings, stop=event)
        reply = client.ask([{"role": "user", "content": "q"}])
        client.close()
    assert reply.rating == 7
    assert (reply.calls, reply.prompt_tokens) == (2, 11)
    assert event.waits == [want]


def test_the_failure_rate_decides_the_exit_code(tmp_path):
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(5)])

    def behave(prompt, times):
        return Say("none") if "Question 81, second" in prompt else by_quality(prompt, times)

    with serving(behave) as server:
        strict = ask(server, tmp_path, retries=0, max_failure_rate=0.05)
        lenient = ask(server, tmp_path, retries=0, max_failure_rate=0.1)
        assert server.calls == 10 + 1  # only the missing one is asked for again
    assert strict.failure_rate == lenient.failure_rate == pytest.approx(0.1)
    assert (strict.exit_code, lenient.exit_code) == (3, 0)


def test_what_was_missing_is_filled_by_the_next_run(tmp_path):
    with serving(lambda prompt, times: Say("none" if times == 0 else "[[8]]")) as server:
        first = ask(server, one_question(tmp_path), retries=0)
        second = ask(server, tmp_path, retries=0)
    assert first.failure_rate == 1
    assert second.failure_rate == 0
    assert second.arms[0].overall.mean == 8


def test_rejudging_adds_judgments_and_takes_the_mean(tmp_path):
    with serving(lambda prompt, times: Say(f"[[{4 + 2 * times}]]")) as server:
        ask(server, one_question(tmp_path))
        outcome = ask(server, tmp_path, rejudge=3, concurrency=1)
        assert server.calls == 6
    assert outcome.arms[0].overall.mean == 6  # of 4, 6 and 8
    assert outcome.arms[0].overall.answers == 2
    assert outcome.arms[0].repeat_spread == pytest.approx(2.0)
    assert outcome.arms[0].missing[1].judgments == 3


def test_another_answer_prompt_judge_or_setting_is_another_judgment(tmp_path):
    with serving() as server:
        ask(server, one_question(tmp_path))
        ask(server, tmp_path, temperature=0.5)
        ask(server, tmp_path, max_tokens=100)
        write_run(tmp_path, [(doc(81), graded(5, 9))])
        ask(server, tmp_path)
        assert server.calls == 2 + 2 + 2 + 1  # turn 1 of the last is what it was


def test_a_dry_run_prints_the_estimate_and_sends_nothing(tmp_path):
    said = []
    write_run(tmp_path, [(doc(81), ["a" * 4000, "b"])])
    with serving() as server:
        settings = JudgeSettings(
            paths=(tmp_path,), model="judge", base_url=server.url, dry_run=True,
            price_input=10.0, price_output=30.0,
        )  # fmt: skip
        outcome = judge(settings, announce=said.append, progress=False)
        assert server.calls == 0
    assert outcome.estimate.calls == 2
    assert 2000 < outcome.estimate.input_tokens < 3000  # the long answer is in both prompts
    assert outcome.estimate.output_tokens == 500
    want = (outcome.estimate.input_tokens * 10 + 500 * 30) / 1e6
    assert outcome.estimate.cost == pytest.approx(want)
    assert said == [outcome.estimate.text()]
    assert "2 calls before retries" in said[0]
    assert not (tmp_path / "mt_bench_judge").exists()


def test_a_question_without_its_reference_is_an_error_before_the_first_call(tmp_path):
    rows = [(doc(81), graded(5, 6)), (doc(123, "coding", ["only for turn 1", ""]), graded(5, 6))]
    write_run(tmp_path, rows)
    with serving(by_quality) as server:
        with pytest.raises(RecipeError, match=r"question 123 \(turn 2\).*--references"):
            ask(server, tmp_path)
        assert server.calls == 0
        outcome = ask(server, tmp_path, allow_missing_references=True)
        assert outcome.failure_rate == 0
        shown = ["only for turn 1" in r["messages"][-1]["content"] for r in server.requests]
        assert sum(shown) == 1


def test_references_of_a_file_replace_those_of_the_dataset(tmp_path):
    write_run(tmp_path, [(doc(111, "math", ["old 1", "old 2"]), graded(5, 6))])
    file = tmp_path / "references.jsonl"
    turns = ["new 1", "new 2"]
    file.write_text(json.dumps({"question_id": 111, "choices": [{"turns": turns}]}))
    with serving(by_quality) as server:
        ask(server, tmp_path, references=file)
        texts = [request["messages"][-1]["content"] for request in server.requests]
    assert all("new 1" in text and "old 1" not in text for text in texts)
    assert sum("new 2" in text for text in texts) == 1


# -- the key ---------------------------------------------------------------------------------------


class RecordingTracker:
    def __init__(self):
        self.said = []

    def scalars(self, values):
        self.said.append(("scalars", dict(values)))

    def table(self, name, columns, rows):
        self.said.append(("table", name, list(columns), [list(row) for row in rows]))

    def image(self, name, path, *, caption=""):
        self.said.append(("image", name, path.name))


def test_the_key_appears_nowhere(tmp_path, monkeypatch, caplog, capsys):
    """Not even where the server repeats it: in verdicts, refusals, failures, and headers."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(3)])

    def talkative(prompt, times):
        said = json.dumps({"error": {"message": f"Bearer {KEY} is odd"}})
        if "Question 81" in prompt:
            return Say(f"Your key is {KEY}. [[5]]")
        if "Question 82" in prompt:
            return Say(status=400, body=said)
        return Say(status=500, body=f"crash with {KEY}")

    tracker = RecordingTracker()
    with serving(talkative) as server:
        settings = JudgeSettings(
            paths=(tmp_path,), model="judge", base_url=server.url, max_wait=0.0, retries=1
        )
        outcome = judge(settings)
        track_outcome(tracker, outcome)
        assert server.keys == {f"Bearer {KEY}"}  # it did reach the server
    print(outcome.summary())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"[key]" in path.read_bytes() for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    shown = capsys.readouterr()
    for text in (caplog.text, shown.out, shown.err, repr(tracker.said), repr(outcome)):
        assert KEY not in text
    assert "Judging" in shown.err


@pytest.mark.parametrize("shown", [KEY, "sk-abc****wxyz"])
def test_the_key_is_not_in_the_error_of_a_refused_run(tmp_path, monkeypatch, shown):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {shown}"}})
    with (
        serving(lambda prompt, times: Say(status=401, body=body)) as server,
        pytest.raises(InfrastructureError) as caught,
    ):
        ask(server, one_question(tmp_path))
    chain, text = caught.value, ""
    while chain is not None:
        text += f"{chain!r} {chain}"
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert shown not in text
    assert "OPENAI_API_KEY" in text


def test_without_a_key_openai_itself_is_not_asked(tmp_path):
    settings = JudgeSettings(paths=(one_question(tmp_path),), model="judge")
    with pytest.raises(RecipeError, match="set OPENAI_API_KEY"):
        judge(settings, announce=lambda text: None, progress=False)


@pytest.mark.parametrize(
    ("variables", "fields", "message"),
    [
        ({}, {"api_key_env": "JUDGE_KEY"}, "JUDGE_KEY, which --api-key-env names, is not set"),
        ({"JUDGE_KEY": "  "}, {"api_key_env": "JUDGE_KEY"}, "is not set"),
        ({"JUDGE_KEY": f"{KEY}\n"}, {"api_key_env": "JUDGE_KEY"}, "JUDGE_KEY holds a blank"),
        ({"OPENAI_API_KEY": f"{KEY} {KEY}"}, {}, "OPENAI_API_KEY holds a blank"),
        ({"OPENAI_API_KEY": f"{KEY}\u2013"}, {}, "a letter that no key has"),
        ({"OPENAI_API_KEY": KEY}, {"base_url": "http://judge.example/v1"}, "unencrypted to http:"),
        ({"OPENAI_API_KEY": KEY}, {"base_url": "http://10.0.0.7:8000/v1"}, "unencrypted to http:"),
        ({"OPENAI_API_KEY": KEY}, {"base_url": "http://localhost.example/v1"}, "--allow-insecure"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_sent_stops_the_run_before_anything_is_written(
    tmp_path, monkeypatch, variables, fields, message
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with serving(by_quality) as server:
        one_question(tmp_path)
        before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
        settings = JudgeSettings(
            paths=(tmp_path,), model="judge", **{"base_url": server.url, **fields}
        )
        with pytest.raises(RecipeError, match=message) as caught:
            judge(settings, announce=lambda text: None, progress=False)
        assert server.calls == 0
    assert KEY not in str(caught.value)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_where_a_key_may_go():
    def key(**fields):
        return JudgeSettings(paths=(Path("x"),), model="m", **fields).api_key()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        for address in (None, "https://judge.example/v1", "http://localhost:1/v1",
                        "http://127.0.0.9:1/v1", "http://[::1]:1/v1"):  # fmt: skip
            assert key(base_url=address) == KEY
        assert key(base_url="http://judge.example/v1", allow_insecure_key=True) == KEY
        assert key(base_url="http://judge.example/v1", api_key_env="none") == "none"
        patch.delenv("OPENAI_API_KEY")
        assert key(base_url="http://judge.example/v1") == "none"


def test_a_key_is_scrubbed_in_every_form():
    odd = 'sk"quote\\back'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", odd)
        client = Client(JudgeSettings(paths=(Path("x"),), model="m"))
    for text in (f"a {odd} b", f"a {json.dumps(odd)} b", f"a {odd!r} b", f"Authorization: {odd}"):
        shown = client.redact(text)
        assert "quote" not in shown
        assert "[key]" in shown
    assert client.redact("header 'Bearer another-secret-of-a-proxy'") == "header 'Bearer [key]'"
    assert client.redact("the bearer of news") == "the bearer of news"
    client.close()


def test_a_tracker_gets_scores_conversations_and_pictures(tmp_path):
    tracker = RecordingTracker()
    with serving(by_quality) as server:
        settings = JudgeSettings(paths=(two_arms(tmp_path),), model="judge", base_url=server.url)
        track_outcome(tracker, judge(settings, announce=lambda text: None, progress=False))
    values = next(said[1] for said in tracker.said if said[0] == "scalars")
    assert values["mt_bench/baseline/overall"] == 6.0
    assert values["mt_bench/few-minus-baseline/overall"] == pytest.approx(0.5)
    _, _, columns, rows = next(said for said in tracker.said if said[0] == "table")
    assert columns[-1] == "score"
    assert len(rows) == 12
    assert rows[0] == ["baseline", "81", "writing", 1, "Question 81, first part?",
                       "An answer. QUALITY=4.", 4.0]  # fmt: skip
    images = [said[1] for said in tracker.said if said[0] == "image"]
    assert images == ["mt_bench/categories"]


def test_pictures_of_three_categories(tmp_path):
    rows = [doc(81), doc(131, "extraction"), doc(151, "humanities")]
    write_run(tmp_path, [(row, graded(3, 5)) for row in rows])
    with serving(by_quality) as server:
        files = ask(server, tmp_path).files
    assert [file.name for file in files[2:]] == ["categories.png", "radar.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[2:])


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "code"), [("0.4", 3), ("0.5", 0)])
def test_the_command_prints_estimate_and_scores_and_ends_with_the_code(tmp_path, rate, code):
    from typer.testing import CliRunner

    from act_harness.cli import app as cli

    def behave(prompt, times):
        return Say("none") if "second part" in prompt else by_quality(prompt, times)

    arguments = [str(one_question(tmp_path)), "--model", "m", "--retries", "0"]
    with serving(behave) as server:
        arguments += ["--base-url", server.url, "--max-failure-rate", rate]
        dry = CliRunner().invoke(cli.app, ["judge", *arguments, "--dry-run"])
        assert (dry.exit_code, server.calls) == (0, 0)
        result = CliRunner().invoke(cli.app, ["judge", *arguments])
    assert result.exit_code == code
    assert "2 calls before retries" in dry.output
    assert "| baseline | turn 1 | 5.00 | - | 1 | 1 |" in result.output
    assert "baseline, turn 2: 1 of 1 judgments missing (100.0%), no rating" in result.output
    assert ("FAILED" in result.output) is (code == 3)
    kept = (tmp_path / "mt_bench_judge" / "judgments.jsonl").read_text().splitlines()
    assert [json.loads(line)["rating"] for line in kept].count(None) == 1
    assert json.loads(kept[0])["schema"] == "act-harness/judgment/1"


# -- kills -----------------------------------------------------------------------------------------

_SCRIPT = """
import sys
from pathlib import Path
from act_harness.mtbench.judge import JudgeSettings, judge, track_outcome
from act_harness.mtbench.judge import summary
settings = JudgeSettings(paths=(Path(sys.argv[1]),), model="judge", base_url=sys.argv[2],
                         concurrency=1, timeout=60)
judge(settings, progress=False)
"""


@pytest.mark.slow
def test_nothing_is_judged_twice_after_a_kill(tmp_path):
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(5)])
    reached, open_again = threading.Event(), threading.Event()

    def hold_the_seventh(prompt, times):
        if server.calls == 7 and not open_again.is_set():
            reached.set()
            open_again.wait(30)
        return Say()

    command = [sys.executable, "-c", _SCRIPT, str(tmp_path)]
    with serving(hold_the_seventh, limit=30) as server:
        process = subprocess.Popen([*command, server.url], env=dict(os.environ))
        try:
            assert reached.wait(60)
            kept = tmp_path / "mt_bench_judge" / "judgments.jsonl"
            until = time.monotonic() + 30  # the sixth is written while the seventh is asked for
            while kept.read_text().count("\n") < 6 and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(30)
        open_again.set()
        subprocess.run([*command, server.url], check=True, timeout=60)
        times = sorted(server.prompts.values())
    assert times == [1] * 9 + [2]  # the one that was under way when the process was killed


def test_an_interrupt_keeps_what_is_under_way(tmp_path, monkeypatch):
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(6)])
    from act_harness.mtbench.judge import judging

    class Interrupting(judging.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    with serving(lambda prompt, times: Say(delay=0.1)) as server:
        monkeypatch.setattr(judging, "tqdm", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            ask(server, tmp_path, concurrency=3)
        asked = server.calls
        assert asked < 12
        monkeypatch.undo()
        outcome = ask(server, tmp_path)
        assert server.calls == 12
        assert set(server.prompts.values()) == {1}
    assert outcome.failure_rate == 0


def test_an_interrupt_while_calls_are_handed_out_keeps_their_replies(tmp_path, monkeypatch):
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(4)])
    from act_harness.mtbench.judge import judging

    class Interrupted(judging.ThreadPoolExecutor):
        handed = 0

        def submit(self, *given):
            self.handed += 1
            if self.handed == 4:
                until(lambda: server.calls == 3)
                raise KeyboardInterrupt
            return super().submit(*given)

    with serving() as server:
        monkeypatch.setattr(judging, "ThreadPoolExecutor", Interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"judgments so far are in .*judgments\.jsonl"):
            ask(server, tmp_path)
        monkeypatch.undo()
        assert server.calls == 3
        assert ask(server, tmp_path).failure_rate == 0
        assert set(server.prompts.values()) == {1}


def test_a_second_interrupt_keeps_what_was_answered(tmp_path, monkeypatch):
    """Whoever presses Ctrl-C again does not wait; the replies that are there were paid for."""
    write_run(tmp_path, [(doc(81 + n), graded(5, 6)) for n in range(4)])
    from act_harness.mtbench.judge import judging

    class Twice(judging.ThreadPoolExecutor):
        handed = stopped = 0

        def submit(self, *given):
            self.handed += 1
            if self.handed == 4:
                until(lambda: server.calls == 3)
                raise KeyboardInterrupt
            return super().submit(*given)

        def shutdown(self, wait=True, **more):
            super().shutdown(wait=True, **more)
            self.stopped += 1
            if self.stopped == 1:
                raise KeyboardInterrupt

    with serving() as server:
        monkeypatch.setattr(judging, "ThreadPoolExecutor", Twice)
        with pytest.raises(KeyboardInterrupt, match=r"judgments so far are in .*judgments\.jsonl"):
            ask(server, tmp_path)
        monkeypatch.undo()
        assert server.calls > 0
        assert ask(server, tmp_path).failure_rate == 0
        assert set(server.prompts.values()) == {1}


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_what_was_saved_and_how_to_go_on(tmp_path, number, code):
    write_run(tmp_path / "o", [(doc(81 + n), graded(5, 6)) for n in range(3)])
    go_on = threading.Event()

    def behave(prompt, times):
        go_on.wait(60)
        return Say()

    with serving(behave) as server:
        command = ["judge", str(tmp_path / "o"), "--model", "m", "--base-url", server.url]
        process = subprocess.Popen(
            [sys.executable, "-m", "act_harness", *command, "--concurrency", "2"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until(lambda: server.calls == 2)
        process.send_signal(number)
        time.sleep(0.2)  # the main thread waits for the calls by then, or will
        go_on.set()
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        kept = (tmp_path / "o" / "mt_bench_judge" / "judgments.jsonl").read_text().splitlines()
        assert len(kept) == server.calls
    line = said.strip().splitlines()[-1]
    assert line.startswith("act-harness: interrupted; judgments so far are in ")
    assert f"go on with: act-harness judge {tmp_path / 'o'} --model m" in line
    assert "Traceback" not in said


def test_an_output_that_cannot_be_written_is_found_before_the_first_call(tmp_path):
    (tmp_path / "file").write_text("")
    with serving() as server:
        for place in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / ("x" * 300)):
            with pytest.raises((InfrastructureError, ResultError), match="choose"):
                ask(server, one_question(tmp_path / "run"), output=place)
        assert server.calls == 0


def test_half_a_surrogate_pair_in_an_answer_is_judged(tmp_path):
    write_run(tmp_path, [(doc(81), ["half \ud835 of one", "QUALITY=6."])])
    with serving() as server:
        assert ask(server, tmp_path).failure_rate == 0


def test_two_judges_do_not_write_to_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    from act_harness.mtbench.judge.ledger import JudgmentLedger

    folder = one_question(tmp_path) / "mt_bench_judge"
    with (
        serving() as server,
        JudgmentLedger.opened(folder),
        pytest.raises(InputError, match="another judge"),
    ):
        ask(server, tmp_path)
    assert server.calls == 0


def test_what_another_judge_rated_since_the_estimate_is_not_asked_again(tmp_path):
    settings = {"paths": (one_question(tmp_path),), "model": "judge", "max_wait": 0.0}
    with serving() as server:

        def announce(text):
            if not server.calls:
                ask(server, tmp_path)

        asked = JudgeSettings(**settings, base_url=server.url)
        outcome = judge(asked, announce=announce, progress=False)
        assert (server.calls, outcome.calls, outcome.failure_rate) == (2, 0, 0.0)


def test_a_ledger_of_something_else_is_refused(tmp_path):
    folder = one_question(tmp_path) / "mt_bench_judge"
    folder.mkdir()
    (folder / "judgments.jsonl").write_text('{"a": 1}\n')
    with serving() as server, pytest.raises(ResultError, match="line 1 is no judgment"):
        ask(server, tmp_path)


def test_a_stopped_client_does_not_sit_out_its_pauses():
    stop = threading.Event()
    with serving(lambda prompt, times: Say(status=500, body="{}")) as server:
        settings = JudgeSettings(paths=(".",), model="m", base_url=server.url, retries=5)
        client = Client(settings, stop=stop)
        stop.set()
        before = time.monotonic()
        reply = client.ask([{"role": "user", "content": "q"}])
        client.close()
    assert reply.calls == 1
    assert reply.rating is None
    assert time.monotonic() - before < 30
