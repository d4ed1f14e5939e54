"""Fixtures shared by all tests: tiny models made from configurations, and real parts if present."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    # Kernels are interpreted where there is no GPU. Triton reads this when it is first imported,
    # which torch or transformers may do, hence before them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts what is put into the background so, and every process
    # started from here would inherit it: no test of an interrupt could pass.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from tiny_models import make_tiny
from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Undo what a command that runs inside the tests does with Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _shared() -> Path:
    named = os.environ.get("ACT_HARNESS_SHARED")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real benchmark rows (``hub``) and the release's outputs (``golden``)."""
    folder = _shared()
    if not folder.is_dir():
        pytest.skip(f"real rows are not at {folder}; set ACT_HARNESS_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def hub_dir(shared_dir: Path) -> Path:
    """Folder with real benchmark rows in the layout of the hub."""
    return shared_dir / "hub"


@pytest.fixture(scope="session")
def golden_dir(shared_dir: Path) -> Path:
    """Folder with the release's inputs and outputs."""
    return shared_dir / "golden"


@pytest.fixture(scope="session")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real SmolLM2-135M-Instruct in float32, converted once and kept in a cache."""
    from act_harness.demo_model import convert, find_gguf
    from act_harness.errors import InfrastructureError

    try:
        find_gguf()
    except InfrastructureError as error:
        pytest.skip(str(error))
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "act-harness" / "smollm2-135m-instruct"
    convert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Factory of tiny random models, see :func:`make_tiny`."""
    return make_tiny


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama in float32 with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: n for n, name in enumerate(["<pad>", "<s>", "</s>", *letters])}
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = make_tiny(dtype=torch.float32, vocab_size=len(vocabulary), max_position_embeddings=256)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_artifact() -> Any:
    """Factory of artifacts for a tiny model; all heads of all layers unless told otherwise."""
    from act_harness.artifact import Artifact
    from act_harness.attention import model_facts
    from act_harness.calibration import Calibration

    def make(model: PreTrainedModel, heads: Any = None, **settings: Any) -> Artifact:
        facts = model_facts(model)
        if heads is None:
            every = tuple(range(facts.num_attention_heads))
            heads = dict.fromkeys(range(facts.num_hidden_layers), every)
        strengths = settings.pop("strengths", None)
        calibration = settings.pop("calibration", None) or Calibration(
            **{"alpha": 1.5, **settings}
            if settings.get("rule") != "absolute" and settings.get("target") != "initial"
            else settings
        )
        return Artifact(
            name="test", model=facts, calibration=calibration, heads=heads, strengths=strengths
        )

    return make
