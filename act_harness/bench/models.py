"""Whole models for the prefill and decode benchmarks: two arms that share one set of weights."""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from act_harness.artifact import Artifact, ModelFacts
from act_harness.attention import Attachment, attach
from act_harness.attention.load import load_plain_model
from act_harness.bench.arguments import (
    Arguments,
    read_count,
    read_device,
    read_dtype,
    read_shapes,
    read_share,
)
from act_harness.bench.common import BenchmarkReport, Table, Timing, command_line, describe_machine
from act_harness.calibration import Calibration
from act_harness.errors import InputError, unknown_name
from act_harness.support import places
from act_harness.support.model_arguments import check_device, check_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

__all__ = [
    "Arms",
    "arms",
    "arms_of",
    "common_options",
    "random_llama",
    "random_tokens",
    "spread_heads",
    "table_of",
]


class Arms:
    """The stock model, and the same weights with calibrated attention."""

    def __init__(
        self, stock: PreTrainedModel, act: PreTrainedModel, attachment: Attachment
    ) -> None:
        """Store both; the parameters are the same tensors."""
        self.stock, self.act, self.attachment = stock, act, attachment

    def items(self) -> list[tuple[str, PreTrainedModel]]:
        """Return both arms by name."""
        return [("stock", self.stock), (f"act ({self.attachment.engine.name})", self.act)]


def spread_heads(
    layers: int, heads: int, share: float, seed: int = 0
) -> dict[int, tuple[int, ...]]:
    """Choose a share of all heads at random."""
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    chosen = sorted(random.Random(seed).sample(every, round(share * len(every))))  # noqa: S311
    found: dict[int, tuple[int, ...]] = {}
    for layer, head in chosen:
        found[layer] = (*found.get(layer, ()), head)
    return found


def llama(device: str, dtype: torch.dtype, *, groups: int, layers: int = 32) -> PreTrainedModel:
    """Make a Llama of the shape of Llama-2-7B with random weights."""
    sizes = {**_SHAPES["7b"], "num_hidden_layers": layers, "num_key_value_heads": groups}
    return _made(sizes, dtype, device, max_position_embeddings=1 << 17)


def _made(sizes: dict[str, int], dtype: torch.dtype, device: str, **more: Any) -> PreTrainedModel:  # noqa: ANN401
    """Make a Llama of some sizes, its weights drawn where and as they are kept."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(**sizes, **more, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def arms(model: PreTrainedModel, *, share: float, engine: str) -> Arms:
    """Attach calibration to a copy of the model that shares its weights."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, dict(tensors))
    config = model.config.get_text_config()
    facts = ModelFacts(
        id="benchmark",
        architecture=type(model).__name__,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        revision="benchmark",
    )
    heads = spread_heads(config.num_hidden_layers, config.num_attention_heads, share)
    artifact = Artifact(
        schema="act-harness/heads/1",
        name="benchmark",
        model=facts,
        calibration=Calibration(),
        heads=heads,
    )
    return Arms(model, twin, attach(twin, artifact, engine=engine, facts=facts))


def arms_of(given: argparse.Namespace) -> Arms:
    """Build both arms from the options of :func:`common_options`."""
    dtype = getattr(torch, given.dtype)
    if given.model.startswith("llama-7b"):
        groups = 8 if given.model.endswith("-gqa") else 32
        model = llama(given.device, dtype, groups=groups, layers=given.layers)
    else:
        model = load_plain_model(given.model, dtype=given.dtype, device=given.device)
    return arms(model, share=given.share, engine=given.engine)


def random_tokens(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Return (B, N) token ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (batch, tokens), generator=generator).to(model.device)


def common_options(parser: argparse.ArgumentParser) -> None:
    """Add what the benchmarks of whole models share."""
    parser.add_argument("--model", default="llama-7b", help="llama-7b, llama-7b-gqa, or a folder")
    parser.add_argument("--layers", type=read_count, default=32, help="layers of llama-7b")
    parser.add_argument(
        "--device",
        type=read_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--dtype", type=read_dtype, default="bfloat16")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--share", type=read_share, default=0.22, help="share of heads calibrated")
    parser.add_argument("--rounds", type=read_count, default=10)
    parser.add_argument("--name", default=None, help="name of the report")


def bench_model(
    arguments: list[str] | None,
    measure: Callable[..., tuple[list[dict[str, Any]], dict[str, Timing]]],
    *,
    name: str,
    title: str,
    description: str | None,
    shapes: tuple[str, str],
    columns: tuple[str, ...],
) -> Path:
    """Run a benchmark of whole models from a command line; return the report's path.

    Args:
        arguments: the command line; that of the process when None.
        measure: takes both arms, batch and tokens, and returns the rows of the table and both
            arms' timings.
        name: the command's name.
        title: heading of the report.
        description: for ``--help``.
        shapes: default of ``--shapes`` and what its two numbers are.
        columns: of the table.
    """
    parser = Arguments(prog=f"act-harness bench {name}", description=description)
    common_options(parser)
    parser.add_argument("--shapes", type=read_shapes, default=shapes[0], help=shapes[1])
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    given = parser.parse_args(arguments)
    places.prepare_folder(given.output)
    pair = arms_of(given)
    kind = torch.device(given.device).type
    heading = f"{Path(given.model).name}, {given.dtype}, {given.share:.0%} of the heads"
    report = BenchmarkReport(
        name=given.name or f"attention-{name}-{kind}",
        title=f"{title} ({kind})",
        machine=describe_machine(given.device),
        command=command_line(),
        remarks=[f"{given.rounds} rounds, arms in turns, order reversed every other round"],
    )
    records: list[dict[str, Any]] = []
    for batch, tokens in given.shapes:
        found, timings = measure(pair, batch, tokens, device=given.device, rounds=given.rounds)
        records += found
        report.add_rounds(f"{batch}x{tokens}", timings)
        report.tables = [table_of(heading, records, columns)]
        report.write(given.output)  # a run that is stopped keeps what it measured
    return Path(given.output) / f"{report.name}.md"


def table_of(title: str, records: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    """Return records as a table."""
    return Table(title, columns, [[record[name] for name in columns] for record in records])


_SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 199},
    "vocabulary": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
                   "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 128256},
}  # fmt: skip


def random_llama(
    shape: str, *, dtype: str = "float32", device: str = "cpu", vocabulary: int | None = None
) -> Any:  # noqa: ANN401
    """Make a random Llama with planted attention sinks, for benchmarks.

    Every query gets a constant part, so that each head looks at the same few tokens in all rows:
    those whose keys happen to point that way. The part lies in the slowly turning coordinates of
    the rotary embedding, so that it holds over the whole prompt.

    Args:
        shape: ``7b``, ``1b``, ``tiny``, or ``vocabulary``: small but for its 128k words.
        dtype: name of a torch dtype.
        device: where the model is made.
        vocabulary: words, where the shape's own number will not do.

    Raises:
        InputError: there is no such shape.
    """
    if shape not in _SHAPES:
        raise InputError(unknown_name(f"shape {shape!r}", shape, _SHAPES))
    check_dtype(dtype)
    check_device(device)
    torch.manual_seed(0)
    sizes = _SHAPES[shape] | ({} if vocabulary is None else {"vocab_size": vocabulary})
    model: Any = _made(sizes, getattr(torch, dtype), device, attention_bias=True)
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    slow = torch.arange(size, device=device) % (size // 2) >= size // 4
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.q_proj.bias
            constant = torch.randn(bias.shape, device=device).view(-1, size) * slow
            bias.copy_(5.0 * constant.reshape(-1))
            layer.self_attn.k_proj.weight.mul_(50.0 / config.hidden_size**0.5)
    return model
