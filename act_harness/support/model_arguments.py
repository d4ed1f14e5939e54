"""The arguments of a model, checked before anything is loaded, and what goes wrong while it loads.

One place for every way in: ``--model_args`` and ``--pretrained`` of our commands, lm-eval's own
command line, and the Python API. A wrong argument is an
:class:`~act_harness.errors.InputError`; a model, device or package that is not there is an
:class:`~act_harness.errors.InfrastructureError`. Both are one line.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented

from act_harness.errors import (
    ActHarnessError,
    InfrastructureError,
    InputError,
    UnsupportedCallError,
    one_line,
    suggestion,
)
from act_harness.support import reading
from act_harness.support.checks import check_batch_size, check_count
from act_harness.support.launcher import launched

__all__ = [
    "LEAST_LENGTH",
    "check_arguments",
    "check_device",
    "check_dtype",
    "check_place",
    "check_vocabulary",
    "loading",
    "model_arguments",
    "parse_arguments",
    "usable_device",
    "usable_parallelize",
]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_DEVICES = ("cpu", "cuda", "mps", "npu", "xpu", "hpu")  # those HFLM places a model on
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_UNKNOWN_KEY = re.compile(r"unexpected keyword argument '(\w+)'")

LEAST_LENGTH = 2
"""Tokens of the shortest sequence that holds anything to score: one is given, one is scored."""

_WITHOUT_EFFECT = {
    "logits_cache": "shared contexts are scored once, see scoring=shared|plain",
    "max_batch_size": "batch_size=auto counts tokens, not rows",
    "truncation": "overlength=truncate|error|skip says what becomes of long requests",
}
"""Arguments of ``hf`` that hf-act takes no notice of, and what stands in their place."""

_SWITCHES = ("add_bos_token", "parallelize", "trust_remote_code", "use_fast_tokenizer")

_OF_TRANSFORMERS = (
    "attn_implementation", "cache_dir", "device_map",
    "local_files_only", "low_cpu_mem_usage", "quantization_config", "token", "use_safetensors",
    "variant",
)  # fmt: skip


def parse_arguments(text: str, name: str = "--model_args") -> dict[str, Any]:
    """Read ``key=value,key=value`` or a JSON object, as lm-eval's command line does.

    Raises:
        InputError: It is neither.
    """
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    try:
        found = try_parse_json(text.strip())
        parsed = found if isinstance(found, dict) else key_val_to_dict(text.strip())
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{name} cannot be read: {one_line(error)}; expected key=value,key=value or a JSON "
            "object"
        ) from None
    return {str(key).strip(): value for key, value in parsed.items()}


def model_arguments(
    pretrained: str | os.PathLike[str] | None,
    model_args: str | Mapping[str, Any],
    *,
    device: str | None = None,
    batch_size: int | str | None = None,
) -> dict[str, Any]:
    """Join the options of a command to the model's arguments; none of them may be given twice.

    Args:
        pretrained: ``--pretrained``.
        model_args: ``--model_args``: text as lm-eval takes it, or a mapping.
        device: ``--device``.
        batch_size: ``--batch-size``.

    Raises:
        InputError: No model is named, or an argument has two values.
        InfrastructureError: This machine has no such device, or no such folder.
    """
    given = parse_arguments(model_args) if isinstance(model_args, str) else dict(model_args)
    check_device(device)
    options = {"pretrained": pretrained, "device": device, "batch_size": batch_size}
    for key, value in options.items():
        if value is None:
            continue
        if key in given and str(given[key]) != str(value):
            option = f"--{key.replace('_', '-')}"
            raise InputError(
                f"{option} is {str(value)!r} and --model_args says {key}={given[key]}; give one "
                "of them"
            )
        given[key] = value
    if not given.get("pretrained"):
        raise InputError(
            f"no model was named{_misspelled(given)}; give --pretrained DIR or --model_args "
            "pretrained=DIR"
        )
    if isinstance(given["pretrained"], str):
        check_place(given["pretrained"], given)  # before tasks are read, which takes long
    return given


def _misspelled(given: Mapping[str, Any]) -> str:
    """Return what to say of an argument that looks like ``pretrained`` and is none."""
    near = difflib.get_close_matches("pretrained", given, n=1)
    return f"; {near[0]!r} is unknown, did you mean 'pretrained'?" if near else ""


def check_arguments(pretrained: Any, given: Mapping[str, Any]) -> None:  # noqa: ANN401 - as HFLM
    """Refuse what can be seen to be wrong without loading anything.

    Args:
        pretrained: A hub id, a folder, or a loaded model.
        given: All other arguments by name.

    Raises:
        InputError: An argument has a value that it cannot have, or one that would do nothing.
        InfrastructureError: There is no such folder, device or GPU.
    """
    if pretrained is None or pretrained == "":
        raise InputError(f"no model was named{_misspelled(given)}; give pretrained=DIR or a hub id")
    for name in ("dtype", "softmax_dtype", "mixed_precision_dtype"):
        check_dtype(given.get(name), name)
    if not _is_harness_default(given.get("device")):
        check_device(given.get("device"))
    check_batch_size(given.get("batch_size"), "batch_size")
    check_count(given.get("max_length"), "max_length", least=LEAST_LENGTH)
    check_count(given.get("prefix_token_id"), "prefix_token_id")
    for name in _SWITCHES:
        if given.get(name) not in (None, True, False):
            raise InputError(f"{name}={one_line(str(given[name]))}, expected True or False")
    template = given.get("chat_template_args")
    if template is not None and not isinstance(template, Mapping):
        raise InputError(
            f"chat_template_args={one_line(repr(template))}, expected a mapping; write "
            """--model_args '{"chat_template_args": {"NAME": VALUE}}'"""
        )
    _check_spread(given)
    if given.get("use_cache") not in (None, True):
        raise UnsupportedCallError(
            "use_cache=False as a model argument would do nothing: generation keeps its cache, "
            "which calibrated attention needs; leave it out"
        )
    for name, instead in _WITHOUT_EFFECT.items():
        if given.get(name) is not None:
            warnings.warn(f"{name} does nothing with hf-act: {instead}", stacklevel=3)
    if isinstance(pretrained, str):
        check_place(pretrained, given)


def _check_spread(given: Mapping[str, Any]) -> None:
    """Refuse what names no way to spread a model over devices, and say where it does nothing."""
    plan = given.get("tp_plan")
    if plan is not None:
        if plan != "auto" and not isinstance(plan, Mapping):
            hint = suggestion(str(plan), ["auto"])
            raise InputError(
                f"tp_plan={one_line(str(plan))} is unknown, expected auto, or a mapping of modules "
                f"to transformers' styles{hint}"
            )
        for name in ("parallelize", "peft", "delta", "autogptq", "gptqmodel", "gguf_file"):
            if given.get(name):
                raise InputError(
                    f"tp_plan and {name} cannot be used together: heads are split while plain "
                    f"weights are read; leave one of them out"
                )
    wanted = given.get("device_map")
    if wanted is None:
        return
    if isinstance(wanted, str) and wanted not in _DEVICE_MAPS:
        try:
            check_device(wanted)
        except InputError:
            hint = suggestion(wanted, (*_DEVICE_MAPS, *_DEVICES))
            raise InputError(
                f"device_map={one_line(wanted)} is unknown, expected {', '.join(_DEVICE_MAPS)}, a "
                f"device, or a mapping of modules to devices{hint}"
            ) from None
    places = wanted.values() if isinstance(wanted, Mapping) else (wanted,)
    for place in places:
        if str(place) == "meta" or not isinstance(place, (str, int, torch.device)):
            raise InputError(
                f"device_map names {one_line(repr(place))}, where no weights can be; expected "
                "devices, 'cpu' or 'disk'"
            )
    if not given.get("parallelize"):
        warnings.warn("device_map does nothing without parallelize=True", stacklevel=4)


def usable_tp_plan(given: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what a user gave
    """Return ``tp_plan``, but None in one process, which holds the whole model without it.

    Warns:
        UserWarning: It was asked for and does nothing.
    """
    wanted = given.get("tp_plan")
    if wanted is None or launched().count > 1:
        return wanted
    warnings.warn(
        "tp_plan does nothing in one process; start several with torchrun --nproc-per-node N",
        stacklevel=3,
    )
    return None


def usable_parallelize(given: Mapping[str, Any]) -> Any:  # noqa: ANN401 - what a user gave
    """Return ``parallelize``, but False where there is no other device than the CPU.

    lm-eval's ``hf`` would lay the whole model on the disk there, below the current folder, and read
    it anew in every forward. A user who names places or memory gets that.

    Warns:
        UserWarning: It was asked for and does nothing.
    """
    wanted = given.get("parallelize", False)
    own = any(given.get(name) is not None for name in ("device_map", "max_cpu_memory"))
    if not wanted or own or any(_devices(kind) for kind in _DEVICES if kind != "cpu"):
        return wanted
    warnings.warn(
        "parallelize=True does nothing here: this machine has no GPU to spread the model over",
        stacklevel=3,
    )
    return False


def usable_device(device: Any) -> str:  # noqa: ANN401 - what a user or lm-eval gave
    """Return the device to load on, for one that :func:`check_arguments` has let pass."""
    if device is None or _is_harness_default(device):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)


def _is_harness_default(device: Any) -> bool:  # noqa: ANN401
    """Whether this is what lm-eval's command line says where ``--device`` was left out."""
    return str(device) == "cuda:0" and not torch.cuda.is_available()


def check_dtype(dtype: Any, name: str = "dtype") -> None:  # noqa: ANN401 - what a user gave
    """Refuse what is no floating type of torch; None and ``auto`` are left to the model.

    Raises:
        InputError: It is none.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto") or (isinstance(found, torch.dtype) and found.is_floating_point):
        return
    hint = suggestion(str(dtype), _DTYPES) or "; did you mean one of these?"
    raise InputError(
        f"{name}={one_line(str(dtype))} is unknown, expected auto, {', '.join(_DTYPES)}{hint}"
    )


def check_device(device: Any) -> None:  # noqa: ANN401 - what a user gave
    """Refuse a device that there is not; lm-eval would quietly take another one.

    Raises:
        InputError: It is no name of a device.
        InfrastructureError: This machine has no such device.
    """
    if device is None:
        return
    kind, colon, number = str(device).partition(":")
    expected = "expected cpu, cuda, cuda:N, mps, npu:N, xpu:N or hpu:N"
    if kind not in _DEVICES or (colon and not (number.isdecimal() and len(number) < 5)):
        hint = "; did you mean 'cuda'?" if kind == "gpu" else suggestion(kind, _DEVICES)
        raise InputError(f"device {one_line(str(device))!r} is unknown, {expected}{hint}")
    if kind == "cpu":
        if colon:
            raise InputError(f"device {str(device)!r} is unknown, {expected}; write 'cpu'")
        return
    there = _devices(kind)
    if int(number or 0) >= there:
        has = f"this machine has {there} of that kind" if there else "this machine has none"
        raise InfrastructureError(f"device {str(device)!r} was asked for and {has}; use cpu")


def _devices(kind: str) -> int:
    """Return how many devices of a kind torch can use."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)  # torch.npu and torch.hpu come with packages of their own
    return int(module.device_count()) if module is not None and module.is_available() else 0


def check_place(pretrained: str, given: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder that is not there or holds no model; hub ids are left to the hub.

    Args:
        pretrained: Hub id or folder.
        given: The model's other arguments: ``revision``, ``subfolder`` and ``gguf_file`` count.

    Raises:
        InfrastructureError: There is no such folder, or no model in it.
        InputError: A revision of a folder was asked for.
    """
    more = given or {}
    shown = one_line(pretrained)
    if reading.is_file(pretrained):
        raise InfrastructureError(
            f"no model at {shown}: it is a file; name the folder that holds config.json (for GGUF "
            "pretrained=FOLDER,gguf_file=FILE)"
        )
    if not reading.is_folder(pretrained):
        try:
            validate_repo_id(pretrained)
        except HFValidationError as error:
            hint = _model_beside(pretrained) or "; check the path"
            raise InfrastructureError(
                f"no model at {shown}: no such folder, and no hub id (OWNER/NAME){hint}"
            ) from error
        return
    if more.get("revision") not in (None, "main"):
        raise InputError(
            f"revision={more['revision']} would do nothing: {shown} is a folder; leave it out, or "
            "give the hub id"
        )
    folder = Path(pretrained, str(more.get("subfolder") or ""))
    if more.get("gguf_file") or reading.is_file(folder / "config.json"):
        return
    if reading.is_file(folder / "adapter_config.json"):
        raise InputError(
            f"{shown} holds a peft adapter and no model; give pretrained=BASE,peft={shown}"
        )
    raise InfrastructureError(
        f"no model at {shown}: the folder holds no config.json; name one that a model was saved to"
    )


@contextmanager
def loading(pretrained: Any, known: Iterable[str] = ()) -> Iterator[None]:  # noqa: ANN401
    """Turn what transformers, tokenizers and safetensors raise on loading into one line.

    Args:
        pretrained: What is loaded, for the message.
        known: Names of the arguments, for a suggestion where one is unknown.

    Raises:
        InputError: An argument is unknown.
        InfrastructureError: The model cannot be had or read.
    """
    shown = one_line(str(pretrained) if isinstance(pretrained, str) else type(pretrained).__name__)
    try:
        yield
    except ActHarnessError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InfrastructureError(
            f"the model {shown} does not fit into memory ({one_line(error)}); free some, or load "
            "it in a smaller dtype"
        ) from error
    except Exception as error:
        unknown = _UNKNOWN_KEY.search(str(error)) if isinstance(error, TypeError) else None
        if unknown is not None:
            names = {*known, *_OF_TRANSFORMERS} - {unknown[1]}
            hint = suggestion(unknown[1], names) or "; hf-act takes those of lm-eval's hf"
            raise InputError(f"unknown model argument {unknown[1]!r}{hint}") from error
        reason = one_line(error, limit=300)
        hint = _model_beside(pretrained) if isinstance(pretrained, str) else ""
        raise InfrastructureError(
            f"the model {shown} cannot be loaded ({type(error).__name__}: "
            f"{reason.rstrip('.')}); check its name, its files and the model's arguments{hint}"
        ) from error


def _model_beside(pretrained: str) -> str:
    """Suggest a model's folder for one that is not there: its name may be a hub id as well."""
    if reading.is_folder(pretrained):
        return ""
    return reading.nearest_beside(pretrained, "*/config.json")


def check_vocabulary(model: Any, tokenizer: Any) -> None:  # noqa: ANN401 - any model, any tokenizer
    """Refuse a tokenizer with more words than the model has vectors for, or with none.

    Where a folder holds no tokenizer, transformers makes an empty one of some classes (Gemma's):
    to it all texts are one unknown word, and every score would be the same in silence.

    Raises:
        InputError: It is another model's, or knows no word.

    Warns:
        UserWarning: Only special tokens, which texts seldom hold, are too many.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} knows no words, as where a "
            "folder holds no tokenizer's files; copy them beside the model, or give tokenizer=DIR"
        )
    vectors = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if vectors is None:
        return
    if tokenizer.vocab_size > vectors:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} words and the model {vectors} vectors for "
            "them; give tokenizer=DIR, the one the model was trained with"
        )
    if len(tokenizer) > vectors:
        warnings.warn(
            f"the tokenizer has {len(tokenizer) - vectors} special tokens that the model has no "
            "vectors for; a text that holds one cannot be scored",
            stacklevel=3,
        )
