"""The exact pass over a tiny model, and the loop over single heads that it must equal."""

from __future__ import annotations

import torch
from tiny_search import documents

from act_harness.artifact import Artifact
from act_harness.attention import calibrated, model_facts
from act_harness.calibration import Calibration
from act_harness.engines import select_engine
from act_harness.scoring.scorer import Item, Scorer
from act_harness.search.compute.exact import ChunkPass
from act_harness.search.compute.layout import chunks_of
from act_harness.search.compute.workbench import Workbench


def loop_scores(model, docs, artifact):
    with calibrated(model, artifact) as attachment:
        scorer = Scorer(model, attachment)
        return [
            [score.loglikelihood for score in scorer.score([Item(*r) for r in doc.requests])]
            for doc in docs
        ]


def relative(scores):
    """Scores of each document relative to its first choice: what margins are made of."""
    return scores - scores[..., :1]


def one_head(model, layer, head, calibration, strength=None):
    return Artifact(
        name="one",
        model=model_facts(model),
        calibration=calibration,
        heads={layer: (head,)},
        strengths=None if strength is None else {layer: {head: strength}},
    )


def exact_scores(model, docs, calibration, strengths, *, chunk_tokens=1 << 12, pack_tokens=64):
    """(layers, strengths, heads, documents, choices) by the exact pass, and its counts."""
    found, counts, order = [], [], []
    with Workbench(model) as bench:
        for chunk in chunks_of(docs, chunk_tokens):
            layout = bench.lay_out(chunk.documents, share=calibration.decode != "running")
            run = ChunkPass(
                bench,
                layout,
                engine=select_engine("torch"),
                calibration=calibration,
                strengths=strengths,
                first_layer=0,
                pack_tokens=pack_tokens,
            )
            base = run.baseline()
            layers = [run.layer(layer, range(bench.heads)) for layer in bench.attentions]
            found.append(torch.stack([change + base for change, _ in layers]))
            counts += [count for _, count in layers]
            order += [doc.key for doc in chunk.documents]
    return torch.cat(found, dim=3), counts, order


def same_as_the_loop(model, places=((0, 1), (0, 2), (1, 0), (1, 3))):
    """Compare; return why the model was run as whole sequences, None where it was not."""
    docs, calibration = documents(3), Calibration(alpha=1.5)
    found, _, order = exact_scores(model, docs, calibration, [calibration.strength_of_all])
    place = [order.index(doc.key) for doc in docs]
    base = torch.tensor(loop_scores(model, docs, None), dtype=torch.float64)
    moved = 0
    for layer, head in places:
        expected = torch.tensor(
            loop_scores(model, docs, one_head(model, layer, head, calibration)), dtype=torch.float64
        )
        got = found[layer, 0, head, place]
        torch.testing.assert_close(relative(got), relative(expected), atol=1e-4, rtol=0)
        moved += int(((expected - base).abs() > 1e-3).sum())
    assert moved > 3
    with Workbench(model) as bench:
        return bench.obstacle
