"""What is installed: the wheel's files, the editable install's stubs, and how both are found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from installed import REPOSITORY, pyproject, python

import act_harness
from act_harness.errors import EXTRAS, InfrastructureError, install_command
from act_harness.support import paths

# Where a wheel carries the repository's data folders; hatch_build.py and paths.py must agree.
CARRIED = {
    "tasks": "lm_eval/tasks/act_harness",
    "search/artifacts": "act_harness/_data/artifacts",
    "search/recipes": "act_harness/_data/recipes",
    "results/baselines": "act_harness/_data/baselines",
}
IMPORTABLE_WITHOUT_TORCH = (
    "artifact",
    "autoload",
    "calibration",
    "cli.app",
    "errors",
    "evidence.compare",
    "evidence.plots",
    "evidence.stats",
    "harness.doctor",
    "harness.launch",
    "plugin",
    "search.methods.registry",
    "search.recipe",
    "support.atomic",
    "support.paths",
    "support.provenance",
    "tracking.wandb_run",
)


def data_files(folder: Path):
    """Return the files below a data folder that version control would hold."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def build(*arguments: str, source: Path, into: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(into), *arguments]
    done = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build both distributions from the repository; return the folder of the two files."""
    folder = tmp_path_factory.mktemp("dist")
    build("--sdist", "--wheel", source=REPOSITORY, into=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Return a folder that holds what pip would unpack from the wheel."""
    folder = tmp_path_factory.mktemp("site")
    shutil.unpack_archive(wheel, folder, "zip")
    return folder


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """Return a folder that holds what pip would unpack for an editable install."""
    folder = tmp_path_factory.mktemp("editable")
    script = (
        "import hatchling.build as b, os, sys; os.chdir(sys.argv[1]); "
        "print(b.build_editable(sys.argv[2]))"
    )
    done = python("-c", script, str(REPOSITORY), str(folder), path=(folder,))
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(folder / done.stdout.split()[-1], folder, "zip")
    return folder


# --- wheel and sdist --------------------------------------------------------------------------


def test_the_wheel_carries_every_data_file(site):
    for source, target in CARRIED.items():
        for file in data_files(REPOSITORY / source):
            carried = site / target / file.relative_to(REPOSITORY / source)
            assert carried.is_file(), f"{carried} is missing"
            assert carried.read_bytes() == file.read_bytes()
    assert list((site / CARRIED["tasks"]).rglob("*.yaml"))
    for room in ("exploration", "reports"):
        pages = f"act_harness/{room}/assets"
        for file in data_files(REPOSITORY / pages):
            assert (site / pages / file.name).read_bytes() == file.read_bytes()
    assert len(list((site / "act_harness/exploration/assets").glob("LICENSE-*.txt"))) == 2


def test_the_wheel_carries_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    allowed = re.compile(r"act_harness/|lm_eval/tasks/act_harness/|act_harness-[^/]+\.dist-info/")
    assert [name for name in names if not allowed.match(name)] == []
    assert [name for name in names if name.endswith((".pth", ".pyc"))] == []
    assert "act_harness/py.typed" in names
    # A file of that name would take lm-eval's place, or its folder's.
    assert not {"lm_eval/__init__.py", "lm_eval/tasks/__init__.py"} & set(names)


def test_a_wheel_from_the_sdist_is_the_same_wheel(built, wheel, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [name for name in names if "/ledgers/" in name or "__pycache__" in name] == []
    shutil.unpack_archive(sdist, tmp_path, "gztar")
    (unpacked,) = tmp_path.iterdir()
    build("--wheel", source=unpacked, into=tmp_path / "again")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert first.namelist() == second.namelist()
        for name in first.namelist():
            assert first.read(name) == second.read(name), name


def test_the_wheel_says_its_version_and_entry_points(wheel):
    assert wheel.name == f"act_harness-{act_harness.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("dist-info/entry_points.txt")]
        text = archive.read(name).decode()
    assert "act-harness = act_harness.cli.app:main" in text
    assert "[lm_eval.models]\nhf-act = act_harness.model:CalibratedHFLM" in text
    assert "[torch.backends]\nact_harness = act_harness.autoload:autoload" in text


def test_a_build_without_tasks_is_refused(tmp_path):
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "act_harness", tmp_path / "act_harness")
    script = "import hatchling.build as b; b.build_wheel('out')"
    done = python("-c", script, path=(tmp_path,))
    assert done.returncode != 0
    assert "no task file" in done.stderr


# --- where the data is found ------------------------------------------------------------------


def ask_paths(*path: Path) -> dict:
    script = """
import json
from act_harness.support import paths
from act_harness.errors import ActHarnessError
found = {}
for name in ("tasks", "artifacts", "recipes", "baselines"):
    try:
        found[name] = str(getattr(paths, f"{name}_path")())
    except ActHarnessError as error:
        found[name] = f"error: {error}"
found["route"] = list(paths.task_route()) if "error" not in found["tasks"] else None
print(json.dumps(found))
"""
    done = python("-c", script, path=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_paths_in_a_wheel(site):
    found = ask_paths(site)
    for name, source in zip(("tasks", "artifacts", "recipes", "baselines"), CARRIED, strict=True):
        if data_files(REPOSITORY / source):
            assert found[name] == str(site / CARRIED[source])
        else:
            assert found[name].startswith("error: ")
    # lm-eval is a package somewhere else here, so it cannot see the files beside our package.
    seen, text = found["route"]
    assert not seen
    assert "--include_path" in text


def test_paths_in_a_checkout():
    found = ask_paths(REPOSITORY)
    assert found["tasks"] == str(REPOSITORY / "tasks")
    assert found["artifacts"] == str(REPOSITORY / "search/artifacts")


def test_a_missing_folder_is_said_in_one_line(tmp_path):
    shutil.copytree(REPOSITORY / "act_harness", tmp_path / "act_harness")
    found = ask_paths(tmp_path)
    assert found["route"] is None
    for name in ("tasks", "artifacts", "recipes", "baselines"):
        said = r"error: the .* are not at .*; install the wheel again with `pip .*`"
        assert re.fullmatch(said, found[name])


def test_a_missing_folder_of_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "hatch_build.py").touch()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "act_harness")
    with pytest.raises(InfrastructureError, match="restore it from version control"):
        paths.recipes_path()


# --- editable install -------------------------------------------------------------------------


def test_an_editable_install_executes_nothing(editable):
    (file,) = editable.glob("*.pth")
    assert file.read_text().split() == [str(REPOSITORY)]
    assert not list(editable.glob("*.py"))


def test_an_editable_install_has_a_stub_for_every_task_file(editable):
    stubs = editable / CARRIED["tasks"]
    names = {path.relative_to(stubs) for path in stubs.rglob("*") if path.is_file()}
    tasks = REPOSITORY / "tasks"
    assert names == {path.relative_to(tasks) for path in tasks.rglob("*.yaml")}
    for name in names:
        assert (stubs / name).read_text() == f'include: "{tasks / name}"\n'


def test_lm_eval_reads_the_stubs_as_the_files_themselves(editable):
    from lm_eval.tasks._index import TaskIndex

    tasks = TaskIndex.build([REPOSITORY / "tasks"])
    stubs = TaskIndex.build([editable / CARRIED["tasks"]])
    assert tasks.keys() == stubs.keys()
    assert {"act_sst2", "act_hellaswag", "act_demo"} <= tasks.keys()
    for name, entry in tasks.items():
        assert entry.cfg == stubs[name].cfg
        assert entry.kind == stubs[name].kind


@pytest.fixture
def route(editable, tmp_path, monkeypatch):
    """Return the stubs' folder inside a stand-in of lm-eval, which paths takes for the real one."""
    harness = tmp_path / "lm_eval"
    shutil.copytree(editable / "lm_eval", harness)
    monkeypatch.setattr(paths, "lm_eval_path", lambda: harness)
    return harness / "tasks/act_harness"


def test_the_route_of_an_editable_install(route):
    assert paths.task_route().found
    assert str(route) in paths.task_route().text


def test_a_task_without_a_stub_is_noticed(route):
    first, *rest = sorted(route.rglob("*.yaml"))
    first.unlink()
    found, text = paths.task_route()
    assert not found
    assert f"1 of {len(rest) + 1} task files have no stub" in text
    assert "pip install -e ." in text


@pytest.mark.parametrize(
    "text", ['include: "/other/checkout/x.yaml"\n', "task: x\n", "include: [\n"]
)
def test_a_stub_of_another_checkout_is_noticed(route, text):
    min(route.rglob("*.yaml")).write_text(text)
    assert not paths.task_route().found


def test_no_lm_eval_is_noticed(monkeypatch):
    monkeypatch.setattr(paths, "lm_eval_path", lambda: None)
    assert not paths.task_route().found


# --- declarations -----------------------------------------------------------------------------


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement).group()).lower()


def test_every_declared_package_is_pinned():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(
        re.fullmatch(r"[\w.-]+==[\w.!+]+(; python_version (<|>=) '3\.11')?", p) for p in pins
    )
    project = pyproject()["project"]
    declared = [*project["dependencies"], *pyproject()["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        declared += extra
    missing = {normalised(name) for name in declared} - {normalised(pin) for pin in pins}
    assert missing == set()
    assert "torch==2.13.0" in pins


def test_commands_that_install_an_extra_name_packages_of_the_index():
    extras = dict(pyproject()["project"]["optional-dependencies"])
    del extras["dev"], extras["docs"]  # nothing that runs asks for them
    declared = {
        name: tuple(r.partition(";")[0] for r in own if "python_version" not in r)
        for name, own in extras.items()
    }
    assert declared == EXTRAS
    assert install_command("wandb") == "pip install 'wandb>=0.31' 'wandb-workspaces>=0.4'"
    for file in (REPOSITORY / "act_harness").rglob("*.py"):
        told = re.findall(r"pip install[^`\n]*act-harness", file.read_text(encoding="utf-8"))
        assert told == [], f"{file.name}: no such package is on the index"


def test_entry_points_name_what_exists():
    groups = pyproject()["project"]["entry-points"]
    model = groups["lm_eval.models"]["hf-act"]
    from act_harness import plugin

    assert list(groups["lm_eval.models"]) == [plugin.MODEL_NAME]
    assert model == plugin.MODEL_TARGET
    module, _, name = model.partition(":")
    room = REPOSITORY / module.replace(".", "/")
    source = "\n".join(file.read_text(encoding="utf-8") for file in sorted(room.glob("*.py")))
    assert f"\nclass {name}(" in source
    # Decorating it as well would collide with the entry that lm-eval's own discovery makes.
    assert "@register_model" not in source


def test_light_modules_import_nothing_heavy():
    names = [f"act_harness.{name}" for name in IMPORTABLE_WITHOUT_TORCH]
    script = f"""
import importlib, json, sys
for name in {names!r}:
    importlib.import_module(name)
heavy = ("torch", "transformers", "lm_eval", "datasets", "matplotlib", "wandb", "openai")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = python("-c", script, path=(REPOSITORY,))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_package_root_imports_none_of_its_modules():
    script = (
        "import sys, act_harness; print(sorted(n for n in sys.modules if n.startswith('act_')))"
    )
    done = python("-c", script, path=(REPOSITORY,))
    # The version is one line that imports nothing.
    assert done.stdout == "['act_harness', 'act_harness._version']\n", done.stderr
