"""The CUDA engine's three paths against the float64 reference: prefill, decode steps, packed rows.

Its kernels are interpreted on the CPU where there is no GPU (``conftest`` switches that on); what
imports this is skipped where triton is not installed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

ON_DEVICE = torch.cuda.is_available()
pytest.importorskip("triton", reason="the package triton is not installed")

import engine_cases as ec

from act_harness.engines.operation import AttentionCall
from act_harness.engines.reference import ReferenceEngine
from act_harness.engines.segments import RaggedOutput, Segments
from act_harness.engines.triton.blocks import Blocks
from act_harness.engines.triton.engine import TritonEngine

DEVICE = "cuda" if ON_DEVICE else "cpu"
SMALL = Blocks(16, 16, 4, 16, 16, 16, items=8, least=16, finish_rows=16)
FUSED = torch.float16 if ON_DEVICE else torch.float32
"""A data type for which torch has a fused kernel that gives its log-sum-exp."""


def _atol(plan, dtype):
    """Largest error of a sum over rows of m - m', whose terms cancel under ``both``."""
    return 5e-3 if plan.calibration.target == "both" and dtype != torch.float32 else 1e-4


def check_prefill(case, plan, *, bare=False, using=None):
    """Compare with the reference; return the result, the exact one, and which kernels ran."""
    kernels = using or TritonEngine(SMALL)
    found, exact = ec.assert_matches(
        kernels, case.to(DEVICE), plan, bare=bare, atol=_atol(plan, case.query.dtype)
    )
    assert "fallback" not in kernels.calls
    return found, exact, kernels.calls


def one_step(kernels, case, plan, state, row, *, change=lambda x: x, bare=False, stock=None):
    """The step of one row; ``change`` makes the tensors that the engine gets."""
    cut = case.until(row + 1)
    geometry = cut.geometry(row, bare=bare)
    return kernels(
        cut.call(row).each(lambda values: change(values.contiguous())),
        geometry=geometry,
        plan=plan,
        state=state,
        stock=stock(cut, geometry) if stock else ec.stock_of(cut, geometry),
    )


def check_steps(kernels, case, plan, **how):
    """Prefill, then each further row; compare with the reference on the whole."""
    case = case.to(DEVICE)
    whole = ec.run(ReferenceEngine(), case, plan).output
    first = int(case.prompt.any(dim=0).nonzero().max()) + 1
    state = ec.run(kernels, case.until(first), plan).state
    outputs = []
    for row in range(first, case.real.shape[1]):
        found = one_step(kernels, case, plan, state, row, **how)
        outputs.append(found.output)
        state = found.state
    ec.compare_outputs(torch.cat(outputs, dim=1), whole[:, first:], case)
    assert "fallback" not in kernels.calls
    assert kernels.calls["step"] == len(outputs)
    return kernels


def attend(call, segments):
    """What flash attention does with segments, one after another; the CPU's stand-in for it."""
    query, key, value, scale = call[:4]
    group = query.shape[1] // key.shape[1]
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32).T
    for q0, nq, k0, nk, _, _ in segments.table.tolist():
        q = query[q0 : q0 + nq].transpose(0, 1).double()
        k, v = (
            x[k0 : k0 + nk].transpose(0, 1).repeat_interleave(group, dim=0).double()
            for x in (key, value)
        )
        logits = q @ k.transpose(1, 2) * scale
        hidden = torch.ones(nq, nk, dtype=torch.bool, device=q.device).triu(nk - nq + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
        output[q0 : q0 + nq] = (logits.softmax(-1) @ v).transpose(0, 1).to(output.dtype)
        lse[:, q0 : q0 + nq] = logits.logsumexp(-1).float()
    return RaggedOutput(output, lse.contiguous())


def packed_row(questions, dtype=torch.float32, **case_settings):
    """Contexts with answers, ((length, prompt, answers), ...), as cases and as one row."""
    cases, parts = [], []
    for seed, (length, prompt, answers) in enumerate(questions):
        total = length + sum(answers)
        case = ec.make_case(
            seed, batch=1, tokens=total, lengths=(total,), prompts=(prompt,), dtype=dtype,
            **{"sinks": (0, 5, 11), **case_settings},
        ).to(DEVICE)  # fmt: skip
        cases.append(case)
        parts.append([x[0].transpose(0, 1) for x in (case.query, case.key, case.value)])
    row = [
        torch.cat(
            [p[n][: q[0]] for p, q in zip(parts, questions, strict=True)]
            + [p[n][q[0] :] for p, q in zip(parts, questions, strict=True)]
        )
        for n in range(3)
    ]
    answers = [(owner, size) for owner, q in enumerate(questions) for size in q[2]]
    segments = Segments.of(
        [q[0] for q in questions], [q[1] for q in questions], answers, torch.device(DEVICE)
    )
    return cases, row, segments


def joined(case, length, begin, size):
    """The context of ``length`` tokens followed by the answer at ``begin``."""
    cut = {
        name: torch.cat(
            [getattr(case, name)[:, :, :length], getattr(case, name)[:, :, begin : begin + size]], 2
        )
        for name in ("query", "key", "value")
    }
    keep = {name: getattr(case, name)[:, : length + size] for name in ("real", "prompt")}
    return replace(case, **cut, **keep)


def check_row(questions, plan, *, engine=None, dtype=torch.float32, **case_settings):
    """Compare every context and answer with the float64 reference; return engine and report."""
    cases, (query, key, value), segments = packed_row(questions, dtype, **case_settings)
    call = AttentionCall(query, segments.gather(key), segments.gather(value), cases[0].scale)
    stock = attend(call, segments)
    kernels = engine or TritonEngine()
    assert kernels.takes_segments(plan, segments.capacity)
    report = kernels.calibrate_segments(call, stock, segments=segments, plan=plan)
    table = iter(segments.table.tolist())
    contexts = [next(table) for _ in questions]
    for number, (case, (length, _, answers)) in enumerate(zip(cases, questions, strict=True)):
        exact = ec.run(ReferenceEngine(), case.until(length), plan)
        first, count = contexts[number][:2]
        ec.compare_outputs(
            stock.output[None, first : first + count], exact.output, case.until(length)
        )
        for name in ("sinks", "few_sinks", "alone", "near"):
            found = getattr(report, name)[number]
            assert torch.equal(found.long(), getattr(exact.report, name)[0].long()), name
        for name in ("moved", "few_moved"):
            found = getattr(report, name)[number].double()
            wanted = getattr(exact.report, name)[0].double()
            torch.testing.assert_close(found, wanted, rtol=5e-3, atol=_atol(plan, dtype))
        begin = length
        for size in answers:
            first, count = next(table)[:2]
            whole = joined(case, length, begin, size)
            wanted = ec.run(ReferenceEngine(), whole, plan, first_row=length, state=exact.state)
            ec.compare_outputs(stock.output[None, first : first + count], wanted.output, whole)
            begin += size
    return kernels, report
