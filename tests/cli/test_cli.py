"""The command line: help that works, one line per user error, documented exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import typer
import typer.testing
from installed import REPOSITORY, python

from act_harness import artifact, errors
from act_harness.cli import app as cli
from act_harness.harness import doctor, launch
from act_harness.support import paths

NESTED = {"artifact": ("show", "verify")}


def command_names():
    for command in typer.main.get_command(cli.app).commands.values():
        for nested in getattr(command, "commands", {None: None}):
            yield (command.name,) if nested is None else (command.name, nested)


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs the command line as the installed script does."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["act-harness", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def test_the_commands_are_those_of_the_architecture():
    known = {("run",), ("eval",), ("search",), ("fetch",), ("doctor",), ("tasks-path",)}
    known |= {("artifact", "show"), ("artifact", "verify")}
    assert known <= set(command_names())


@pytest.mark.parametrize("names", list(command_names()), ids="-".join)
def test_every_command_has_help_with_an_example(call, names):
    code, out, _ = call(*names, "--help")
    assert code == 0
    _, example = out.split("Example:\n")
    command = " ".join(("act-harness", *names))
    assert command in example
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize("names", [(), ("artifact",), ("bench",)])
def test_a_list_of_commands_cuts_no_description(call, names):
    code, out, _ = call(*names, "--help")
    assert code == 0
    lines = out.partition("Commands:\n")[2].splitlines()
    assert len(lines) >= 3
    assert not [line for line in lines if line.endswith("...")]


def test_commands_are_listed_as_their_page_introduces_them(call):
    _, out, _ = call("--help")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    page = (REPOSITORY / "docs/commands.md").read_text(encoding="utf-8")
    told = list(dict.fromkeys(re.findall(r"(?m)^\| `act-harness ([a-z]+)", page)))
    assert len(told) > 10
    assert [name for name in listed if name in told] == told


def test_help_documents_the_exit_codes(call):
    _, out, _ = call("--help")
    described = " ".join(out.split())
    classes = (errors.InputError, errors.InfrastructureError, errors.InternalError)
    for number in (0, 1, *(kind.exit_code for kind in classes)):
        assert f" {number} " in described.partition("Exit codes:")[2]


def test_version(call):
    code, out, _ = call("--version")
    assert (code, out.strip()) == (0, cli.act_harness.__version__)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TaskError("no\n such  task"), 2),
        (errors.InfrastructureError("no data"), 3),
        (errors.InternalError("a bug"), 70),
    ],
)
def test_a_user_error_is_one_line_with_its_exit_code(call, monkeypatch, error, code):
    def fail(arguments):
        raise error

    monkeypatch.setattr(launch, "run_lm_eval", fail)
    found, out, err = call("run")
    assert (found, out) == (code, "")
    assert err == f"act-harness: {' '.join(str(error).split())}\n"


def test_a_crash_is_no_verdict(call, monkeypatch):
    monkeypatch.setattr(launch, "run_lm_eval", lambda arguments: 1 / 0)
    code, _, err = call("run")
    assert code == 70
    assert "Traceback" in err
    assert "ZeroDivisionError" in err


@pytest.mark.parametrize(
    "arguments", [["evla"], ["eval"], ["eval", "--task", "x"], ["tasks-path", "x"]]
)
def test_a_wrong_call_is_bad_input(call, arguments):
    code, _, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_a_warning_of_ours_is_one_line(call, monkeypatch):
    """It came as Python has it: a file of the installation, and the line of code behind it."""
    raised = "import warnings\nwarnings.warn('of the search', stacklevel=1)"
    texts = {}

    def command(**_):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", keep)
            exec(compile(raised, cli.__file__, "exec"))  # noqa: S102
            exec(compile(raised, "/elsewhere/package.py", "exec"))  # noqa: S102
        return 0

    def keep(message, category, filename, lineno, file=None, line=None):
        texts[filename] = warnings.formatwarning(message, category, filename, lineno, line)

    monkeypatch.setattr(cli, "app", command)
    before = warnings.formatwarning
    assert call()[0] == 0
    assert texts[cli.__file__] == "warning: of the search\n"
    assert texts["/elsewhere/package.py"].startswith("/elsewhere/package.py:2: UserWarning: of")
    assert warnings.formatwarning is before


def test_run_hands_every_argument_on(call, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "run_lm_eval", seen.extend)
    given = ["--model", "hf-act", "-L", "5", "--tasks", "a,b", "--help", "ls", "--seed=1"]
    code, _, _ = call("run", *given)
    assert (code, seen) == (0, given)


def test_tasks_path_prints_the_folder(call):
    code, out, _ = call("tasks-path")
    assert code == 0
    assert out.strip() == str(REPOSITORY / "tasks")


def test_artifact_show(call, tmp_path):
    file = tmp_path / "small.json"
    content = {
        "schema": "act-harness/heads/1",
        "name": "small",
        "model": {
            "id": "m",
            "architecture": "LlamaForCausalLM",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "calibration": {"target": "sinks"},
        "heads": {"1": [0, 3]},
    }
    file.write_text(json.dumps(content))
    code, out, err = call("artifact", "show", str(file), "--full")
    assert code == 0, err
    assert json.loads(out)["heads"] == {"1": [0, 3]}
    assert err.startswith("2 heads")
    code, out, _ = call("artifact", "show", str(file))
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (lines["name"], lines["model"]) == ("small", "m (LlamaForCausalLM)")
    assert lines["1"] == "0 3"
    assert lines["heads"].startswith("2,")
    assert "target=sinks" in lines["calibration"]


def test_artifact_list_names_what_artifact_takes(call):
    code, out, _ = call("artifact", "list")
    assert code == 0
    listed = [line.split()[:2] for line in out.splitlines()[1:]]
    assert [name for name, _ in listed] == list(artifact.shipped_artifacts())
    for name, count in listed:
        assert artifact.load_artifact(name).head_count() == int(count)


def test_an_unknown_artifact_is_bad_input(call, monkeypatch, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/classification.json").write_text("{}")
    monkeypatch.setattr(paths, "artifacts_path", lambda: tmp_path)
    code, _, err = call("artifact", "show", "clasification")
    assert code == 2
    assert err.count("\n") == 1
    assert "did you mean 'classification'" in err or "llama/classification" in err


def test_show_says_what_a_searched_set_is_worth(call):
    found = artifact.load_artifact("smollm2-135m-instruct/general")
    _, out, _ = call("artifact", "show", "smollm2-135m-instruct/general")
    assert f"judged       {found.judgement()[0]}\n" in out
    _, out, _ = call("artifact", "show", "llama-2-7b-chat/release-mt-bench")
    assert "judged" not in out  # a published list: no search of ours judged it


# --- doctor -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reachable", [True, False])
def test_doctor_exit_code(call, monkeypatch, reachable):
    findings = (doctor.Finding("model hf-act", "ok", "text"), doctor.Finding("x", "off", "more"))
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Diagnosis(findings, reachable))
    code, out, _ = call("doctor")
    assert code == (0 if reachable else 2)
    assert out.splitlines()[:2] == ["ok    model hf-act  text", "off   x             more"]
    assert ("does not work here" in out) is not reachable


@pytest.mark.parametrize("state", ["ok", "fail"])
def test_doctors_last_line_does_not_hide_a_failure(state):
    findings = (doctor.Finding("model hf-act", "ok", "x"), doctor.Finding("tasks", state, "y"))
    last = doctor.render(doctor.Diagnosis(findings, reachable=True)).splitlines()[-1]
    if state == "ok":
        assert last == "`lm_eval --model hf-act` works here."
    else:
        assert last.endswith("works here, but not all is well: see 'fail' at tasks.")


def test_doctor_tells_why_the_model_is_out_of_reach():
    done = python(
        "-m", "act_harness", "doctor", path=(REPOSITORY,), TORCH_DEVICE_BACKEND_AUTOLOAD="0"
    )
    assert done.returncode == 2, done.stderr
    states = {
        line[6:].split("  ")[0]: line[:4].strip() for line in done.stdout.splitlines() if line
    }
    assert states["torch autoload"] == "off"
    assert states["model hf-act"] == "fail"
    assert states["lm-eval package"] == "ok"


def test_doctor_says_of_a_model_what_decided_each_answer(call, monkeypatch, tiny, tmp_path):
    findings = (doctor.Finding("model hf-act", "ok", "text"),)
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Diagnosis(findings, reachable=True))
    tiny("mistral").save_pretrained(tmp_path / "model")
    code, out, err = call("doctor", "--pretrained", str(tmp_path / "model"), "--device", "cpu")
    assert code == 0, err
    lines = out.splitlines()
    assert "MistralForCausalLM in float64 on cpu" in lines
    rows = {line[:20].rstrip(): line[20:].split(maxsplit=1) for line in lines[-8:]}
    assert rows["has a window of"] == ["6", "its configuration says sliding_window=6"]
    assert rows["packs requests"][0] == "no"
    assert rows["can be calibrated"][0] == "yes"
    assert rows["extends caches"][0] == "left"
    assert float(rows["rounds logits by"][0]) < 1e-3


def test_doctor_takes_a_models_options_with_a_model_only(call):
    code, _, err = call("doctor", "--dtype", "float32")
    assert code == 2
    assert "name it with --pretrained" in err


def test_doctor_sees_an_lm_eval_that_our_folder_hides(tmp_path):
    """A bare folder `lm_eval` on the path is what an editable lm-eval can be hidden by."""
    (tmp_path / "lm_eval/tasks/act_harness").mkdir(parents=True)
    script = f"""
import sys
from importlib.machinery import PathFinder
sys.path[:] = [p for p in sys.path if not p.endswith("site-packages")] + [{str(tmp_path)!r}]
from act_harness.harness import doctor
from act_harness.support import paths
print(paths.lm_eval_path(), doctor._harness().state)
"""
    done = python("-c", script, path=(REPOSITORY,))
    assert done.stdout.split() == ["None", "fail"], done.stderr


# --- run --------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch):
    """Return the list of namespaces lm-eval's command line was started with; it runs nothing."""
    from lm_eval._cli import HarnessCLI

    started = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, namespace: started.append(namespace))
    monkeypatch.setattr(launch.plugin, "register", lambda: True)
    return started


def test_run_is_lm_evals_own_command_line(harness):
    before = list(sys.argv)
    launch.run_lm_eval(["--model", "hf-act", "--tasks", "a,b", "--limit", "3"])
    launch.run_lm_eval(["ls", "tasks"])
    assert sys.argv == before
    run, ls = harness
    assert (run.command, run.model, run.tasks, run.limit) == ("run", "hf-act", ["a", "b"], 3)
    assert (ls.command, ls.what) == ("ls", "tasks")


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize(
    "command", [["--tasks", "a"], ["ls", "tasks"], ["validate", "--tasks", "a"]]
)
def test_run_adds_the_tasks_only_where_lm_eval_lacks_them(harness, monkeypatch, found, command):
    monkeypatch.setattr(launch, "task_route", lambda: paths.TaskRoute(found, ""))
    launch.run_lm_eval([*command, "--include_path", "mine"])
    expected = "mine" if found else ["mine", str(paths.tasks_path())]
    assert harness[0].include_path == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "hf-act", "--model_args", "pretrained=m,artifact=none"], "out/baseline"),
        (["--model", "hf-act", "--model_args", "artifact=None"], "out/baseline"),
        (["--model", "hf-act"], "out/act"),
        (["--model", "hf"], "out"),
        (["--config", "{config}"], "out/baseline"),
    ],
)
def test_run_names_the_results_folder_by_arm(harness, tmp_path, arguments, expected):
    config = tmp_path / "c.yaml"
    config.write_text("model: hf-act\nmodel_args: pretrained=m,artifact=none\n")
    arguments = [text.format(config=config) for text in arguments]
    launch.run_lm_eval([*arguments, "--tasks", "a", "--output_path", "out"])
    assert harness[0].output_path == expected


def test_run_names_the_results_folder_by_the_artifacts_own_name(monkeypatch):
    named = argparse.Namespace(name="demo/best")
    monkeypatch.setattr(artifact, "load_artifact", lambda reference: named)
    assert launch.arm_name({"artifact": "some/where.json"}) == "demo-best"


@pytest.mark.parametrize(
    ("text", "words"), [("- a\n", "expected a mapping"), ("a: [\n", "YAML"), (None, "c.yaml")]
)
def test_a_bad_config_file_is_one_line(harness, tmp_path, text, words):
    config = tmp_path / "c.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(errors.InputError, match=words) as caught:
        launch.run_lm_eval(["--config", str(config), "--tasks", "a"])
    assert "\n" not in str(caught.value)


def test_a_user_error_inside_lm_eval_ends_as_one_line(call, monkeypatch):
    from lm_eval._cli import HarnessCLI

    def fail(self, namespace):
        raise errors.ArtifactError("artifact 'x' is unknown")

    monkeypatch.setattr(HarnessCLI, "execute", fail)
    monkeypatch.setattr(launch.plugin, "register", lambda: True)
    code, _, err = call("run", "--model", "hf-act", "--tasks", "a")
    assert (code, err) == (2, "act-harness: artifact 'x' is unknown\n")


def test_lm_evals_other_errors_stay_its_own(monkeypatch):
    from lm_eval._cli import HarnessCLI

    def fail(self, namespace):
        raise ValueError("something else")

    monkeypatch.setattr(HarnessCLI, "execute", fail)
    monkeypatch.setattr(launch.plugin, "register", lambda: True)
    with pytest.raises(ValueError, match="something else"):
        launch.run_lm_eval(["--tasks", "a"])


@pytest.mark.slow
def test_a_misspelt_task_gets_a_suggestion_for_real():
    arguments = ("-m", "act_harness", "run", "--model", "dummy", "--tasks", "act_demo_wrod")
    done = python(*arguments, path=(REPOSITORY,))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = "act-harness: unknown task 'act_demo_wrod'; did you mean 'act_demo_word'?"
    assert done.stderr.splitlines()[-1].startswith(line)


def test_a_misspelt_model_gets_a_suggestion():
    from lm_eval.api.registry import get_model

    with pytest.raises(ValueError, match="hf-atc") as caught:
        get_model("hf-atc")
    explained = launch._explained(caught.value, include_path=None)
    assert isinstance(explained, errors.InputError)
    assert str(explained) == "unknown model 'hf-atc'; did you mean 'hf-act'?"


@pytest.mark.slow
def test_threads_of_a_command_sleep_while_they_wait():
    """OpenMP says what it was told when torch loads it; spinning took 80 s for 16 s' work."""
    code = """
import sys
from act_harness.cli import app as cli
sys.argv = ["act-harness", "--version"]
try:
    cli.main()
except SystemExit:
    pass
if "torch" in sys.modules:
    raise RuntimeError("torch came first")
import torch
"""
    wanted = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**wanted, **given, "OMP_DISPLAY_ENV": "TRUE"},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr


@pytest.mark.parametrize(
    ("words", "argument"),
    [(("search",), "recipe"), (("methods",), "recipe"), (("eval",), None), (("regress",), None)],
)
def test_arguments_and_options_are_what_they_were_declared(words, argument):
    """Python 3.10 made an option of every argument without a value: `search demo` was refused."""
    command = typer.main.get_command(cli.app).commands[words[0]]
    arguments = [one.name for one in command.params if one.param_type_name == "argument"]
    assert arguments == ([argument] if argument else [])
    assert "tracking" not in [one.name for one in command.params]
    if words == ("eval",):
        config = next(one for one in command.params if one.name == "config")
        assert config.is_eager  # read before the others
