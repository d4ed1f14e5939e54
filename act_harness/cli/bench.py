"""``act-harness bench``: benchmarks of the engines, of scoring and of the search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_harness.cli.options import DataDir, Tasks
from act_harness.cli.parsing import names, numbers

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Measure speed and accuracy, side by side in one run.\n\nTables and plots go to "
    "results/benchmarks/.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench_app.command("scoring")
def bench_scoring(
    pretrained: Annotated[str, typer.Option(help="Hub id or folder of the model.")],
    tasks: Tasks = "hellaswag",
    num_fewshot: Annotated[str, typer.Option(help="Numbers of examples, by commas.")] = "0",
    limit: Annotated[int, typer.Option(min=1, help="Documents per task.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a forward.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all variants in turns.")] = 3,
    dtype: Annotated[str, typer.Option(help="Dtype of the model.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    export: Annotated[
        Path | None, typer.Option(help="Store the requests as token ids there, and stop.")
    ] = None,
    data_dir: DataDir = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path(
        "results/benchmarks"
    ),
) -> None:
    """Stock `hf` against `hf-act`, on the same requests.

    \b
    Example:
      act-harness bench scoring --pretrained .demo/model --tasks act_demo_word --limit 50
    """
    from act_harness.bench.scoring import ScoringSettings, bench_tasks

    print(
        bench_tasks(
            pretrained,
            names(tasks),
            list(numbers(num_fewshot, "--num-fewshot")),
            ScoringSettings(batch_sizes=(batch_size,), rounds=rounds, device=device, output=output),
            limit=limit,
            dtype=dtype,
            export=export,
            data_dir=data_dir,
        )
    )


_OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


def _bench(name: str) -> None:
    """Add a benchmark that reads its own options (it must run where typer is missing too)."""
    import importlib

    def command(context: typer.Context) -> None:
        if {"-h", "--help"} & set(context.args):
            example = f"act-harness bench {name} {_BENCH_EXAMPLES[name]}"
            print(f"{_BENCHES[name]}\n\nExample:\n  {example}\n")
        module = name.replace("-", "_")
        importlib.import_module(f"act_harness.bench.{module}").main(context.args)

    command.__doc__ = _BENCHES[name]
    bench_app.command(name, context_settings=_OWN_OPTIONS, add_help_option=False)(command)


_BENCHES = {
    "attention": "The attention operation: engines against stock.",
    "prefill": "Whole-model prefill, calibrated against stock.",
    "decode": "Decoding over a long context, calibrated against stock.",
    "accuracy": "Errors of an engine against the float64 reference.",
    "search": "Head search: one at a time, exhaustive, screened.",
    "memory": "Peak memory of scoring with a large vocabulary.",
    "equality": "Log-likelihoods against stock, and one by one.",
    "rounding": "`hf-act` without heads against `hf`, in any dtype.",
    "random-scoring": "Random cases: shared, plain and reference scoring.",
    "several": "Several GPUs against one: scores, search, text.",
    "coverage": "How often 95 % intervals hold the truth, simulated.",
    "everything": "All that the table of speed in docs names, in parts.",
}
_BENCH_EXAMPLES = {
    "attention": "--device cpu --dtype float32 --shapes 1x256 --rounds 3",
    "prefill": "--model .demo/model --device cpu --dtype float32 --shapes 1x256",
    "decode": "--model .demo/model --device cpu --dtype float32 --shapes 1x256",
    "accuracy": "--device cpu --dtypes float32 --tokens 31,127",
    "search": "--random tiny --samples 4",
    "memory": "--shape tiny --contexts 4 --tokens 64",
    "equality": "--model .demo/model --requests requests.json.gz --limit 8",
    "rounding": "--model .demo/model --tasks act_demo_word --dtype bfloat16 --limit 8",
    "random-scoring": "--cases 5000 --seed 0",
    "several": "--devices 2 --cpu --pretrained .demo/model --tasks act_demo --only eval",
    "coverage": "--cases normal --units 5 --repetitions 50",
    "everything": "--model .demo/model --parts prefill --device cpu --rounds 1",
}
for _name in _BENCHES:
    _bench(_name)
