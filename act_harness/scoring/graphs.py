"""Packed forwards captured as CUDA graphs, and run again without the host.

A forward over a few thousand tokens of a small model takes a GPU less time than a host needs to
launch its thousand kernels: on one H100, 18 ms of 42 for SmolLM2 with 9 thousand tokens, 2 of 27
with 400. A captured forward is launched in one go. A graph fixes every shape, so the forwards
to come are planned: neighbours in size share a :class:`~act_harness.engines.segments.Capacity`, and
what they leave of it holds pads, which no token sees. The first of them is run and captured.

Only forwards that attend over segments in all layers are captured (half precision, one device). A
model that decides something by values (a mixture of experts, say) cannot be captured: it is run as
any other, without rounding, after one line in the log.
"""

from __future__ import annotations

import functools
import gc
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from act_harness.attention.capabilities import Answer, GraphKind, capabilities_of
from act_harness.attention.facts import decoder_of
from act_harness.attention.packing import Packing
from act_harness.attention.packing_trial import packed_forward
from act_harness.attention.parallel import HeadGroup
from act_harness.attention.placement import input_device
from act_harness.attention.rounding import alike
from act_harness.engines.segments import Capacity, Segments, upload
from act_harness.errors import InternalError
from act_harness.scoring.head import head_input

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from act_harness.attention.attachment import Attachment
    from act_harness.engines.operation import Report

__all__ = ["CudaGraphs", "GraphCapture", "PackedForwards", "PackedOutput", "layer_seconds"]

HOST_SECONDS = 1e-3
"""Time that a host takes to launch a decoder layer; measured 0.7 to 1.3 ms (results/benchmarks)."""

_MOST = 64
"""Graphs captured of one plan."""

_logger = logging.getLogger(__name__)


class PackedOutput(NamedTuple):
    """What a packed forward leaves on the device; of a graph, until it runs again."""

    hidden: Tensor  # (N, hidden): what the output head is given
    totals: Tensor | None  # (contexts or more, 7): see ``Attachment.totals``


class GraphCapture(Protocol):
    """Captures device work."""

    def capture(self, work: Callable[[], PackedOutput]) -> tuple[PackedOutput, Callable[[], None]]:
        """Capture ``work``; return where its results will be, and what runs it again."""
        ...


@functools.lru_cache(maxsize=64)
def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the stream to capture on; one for all, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Captures CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _side_stream(torch.cuda.current_device())

    def capture(self, work: Callable[[], PackedOutput]) -> tuple[PackedOutput, Callable[[], None]]:
        """See :class:`GraphCapture`.

        Raises:
            RuntimeError: something in ``work`` cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # freeing another graph meanwhile would break this one
        try:
            with torch.cuda.stream(self._stream):
                # torch.cuda.graph() would empty the allocator's cache as well
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    found = work()
                finally:
                    graph.capture_end()
        except RuntimeError:
            # an invalid capture leaves the allocator waiting for its end, in some releases of
            # torch; in the others there is nothing to end, which is an error again
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return found, graph.replay


@dataclass
class _Graph:
    inputs: Tensor  # the numbers that it reads
    found: PackedOutput
    replay: Callable[[], None]
    reports: dict[int, Report]


def layer_seconds(model: PreTrainedModel, tokens: int) -> float:
    """Estimate how long a GPU computes one decoder layer, in seconds.

    From two measurements on an H100: matrix products at 500 TFLOP/s, and 87 passes over the hidden
    states at 2.5 TB/s for everything else.
    """
    config = model.config.get_text_config()
    words = {
        id(weight): weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in module.parameters()
    }
    decoder = decoder_of(model)  # of a composite model, without what looks at images
    own = sum(weight.numel() for weight in decoder.parameters() if id(weight) not in words)
    products = 2 * own / config.num_hidden_layers / 5e14
    passes = 87 * 2 * config.hidden_size / 2.5e12
    return float(tokens * (products + passes))


class PackedForwards:
    """Runs packed forwards of one model, calibrated or not, and captures those worth it."""

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment | None,
        capture: Callable[[], GraphCapture] = CudaGraphs,
    ) -> None:
        """Store the settings.

        Args:
            model: one that :func:`act_harness.attention.packing_trial.packs` accepts.
            attachment: active calibration, or None.
            capture: makes what captures, when the first graph is due.
        """
        self.model, self.attachment = model, attachment
        self.make_capture = capture
        self.captured = 0
        """Forwards captured so far."""
        self.replayed = 0
        """Forwards that were run by a graph."""
        self._planned: dict[Capacity, Capacity] = {}  # shared capacity of each exact one
        self._capture: GraphCapture | None = None
        self._graphs: dict[Capacity, _Graph] = {}
        self._refusal = (
            "its processes would have to record together" if HeadGroup.of(model).is_split else ""
        )
        self._seconds = layer_seconds(model, 1)

    def plan(self, capacities: Sequence[Capacity]) -> None:
        """Let forwards that are to come share capacities; given are the least of each, in order.

        Neighbours share one while none gets more pads than ``width``, which balances the time of
        all pads against that of the captures: with n forwards whose times spread over R, and
        captures that take H each, twice that with the forward before them, k graphs cost
        ``2 k H + n R / 2 k``.
        """
        self._planned = {}
        seconds = [capacity.tokens * self._seconds for capacity in capacities]
        known = self._known.get(self._about)
        if self._refusal or not capacities or (known is not None and not known.value):
            return
        spread = max(seconds) - min(seconds)
        width = (4 * HOST_SECONDS * spread / len(capacities)) ** 0.5
        runs: list[tuple[Capacity, list[Capacity]]] = []
        for capacity, time in zip(capacities, seconds, strict=True):
            if time > HOST_SECONDS:
                continue
            shared, members = runs.pop() if runs else (capacity, [])
            joined = shared.joined(capacity)
            if (joined.pads - 1) * self._seconds <= width:
                members.append(capacity)
                runs.append((joined, members))
            else:
                runs += [(shared, members), (capacity, [capacity])]
        for shared, members in runs[:_MOST]:
            saved = (len(members) - 1) * (HOST_SECONDS - shared.tokens * self._seconds)
            if saved > 2 * HOST_SECONDS:  # the capture's own time, and as much for a fast host
                self._planned.update((capacity, shared) for capacity in members)

    def capacity(self, lengths: Sequence[int], answers: Sequence[tuple[int, int]]) -> Capacity:
        """Return the capacity that contexts of ``lengths`` and (context, tokens) of answers get."""
        exact = Capacity.of(lengths, answers)
        return self._planned.get(exact, exact)

    def run(
        self, numbers: npt.NDArray[np.int64], capacity: Capacity, prompts: Sequence[int]
    ) -> PackedOutput:
        """Run a forward; its results are on the device, which is not waited for.

        Args:
            numbers: token ids (N,), positions (N,), and what ``lay_out`` writes, in a row.
            capacity: what :meth:`capacity` returned.
            prompts: prompt tokens of each context.
        """
        device = input_device(self.model)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            return self._run(numbers, capacity, prompts, device)

    def _run(
        self,
        numbers: npt.NDArray[np.int64],
        capacity: Capacity,
        prompts: Sequence[int],
        device: torch.device,
    ) -> PackedOutput:
        """Run a forward, with the model's device as the current one."""
        graph = self._graphs.get(capacity)
        if graph is not None:
            graph.inputs.copy_(upload(numbers, device), non_blocking=True)
            graph.replay()
            self.replayed += 1
            if self.attachment is not None:
                self.attachment.note_replay(graph.reports, prompts)
            return (
                graph.found
                if self._trusts(graph, capacity, prompts)
                else self._again(graph.inputs, capacity, prompts)
            )
        inputs = upload(numbers, device)
        found = self._forward(inputs, capacity, prompts)
        if capacity.pads and not self._refusal:
            self._capture_forward(inputs, capacity, prompts)
        return found

    def forget(self) -> None:
        """Drop plan, graphs, and their memory."""
        self._planned = {}
        self._graphs.clear()
        self._capture = None

    # -- one forward -------------------------------------------------------------------------

    def _forward(self, inputs: Tensor, capacity: Capacity, prompts: Sequence[int]) -> PackedOutput:
        count = capacity.tokens
        segments = Segments.over(inputs[2 * count :], capacity)
        packing = Packing((), tuple(prompts), laid_out=segments)
        with packed_forward(self.model, packing), head_input(self.model) as seen:
            self.model(
                input_ids=inputs[None, :count],
                position_ids=inputs[None, count : 2 * count],
                use_cache=False,
            )
        if not seen:
            raise InternalError("the model does not call its output head as a module")
        attachment = self.attachment
        return PackedOutput(seen[0][0], None if attachment is None else attachment.totals())

    def _capture_forward(self, inputs: Tensor, capacity: Capacity, prompts: Sequence[int]) -> None:
        """Capture the forward that was just run, so that all its kernels are loaded."""
        try:
            if self._capture is None:
                self._capture = self.make_capture()
            found, replay = self._capture.capture(lambda: self._forward(inputs, capacity, prompts))
        except torch.OutOfMemoryError:
            self._refuse("memory ran out")
            return
        except RuntimeError as error:
            self._refuse_model(" ".join(str(error).split())[:200])
            return
        self.captured += 1
        reports = {} if self.attachment is None else dict(self.attachment.reports)
        self._graphs[capacity] = _Graph(inputs, found, replay, reports)

    @property
    def _known(self) -> dict[GraphKind, Answer[bool]]:
        return capabilities_of(self.model).graphs

    @property
    def _about(self) -> GraphKind:
        """What a graph holds beside the model: the engine and its calibration, or nothing."""
        if self.attachment is None or self.attachment.artifact is None:
            return None
        return self.attachment.engine.name, self.attachment.artifact.calibration

    def _refuse_model(self, reason: str) -> None:
        """Capture no forward of this model again."""
        self._known[self._about] = Answer(False, reason)
        self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self.forget()
        _logger.info(
            "%s: forwards are launched one by one, as they cannot be recorded: %s",
            type(self.model).__name__,
            reason,
        )

    def _trusts(self, graph: _Graph, capacity: Capacity, prompts: Sequence[int]) -> bool:
        """Whether the graph, just run on other tokens than it was made with, is right.

        Seen once for each model: what a graph would keep of the first tokens, it always would.
        """
        known = self._known
        if self._about in known:
            return known[self._about].value
        expected = self._forward(graph.inputs, capacity, prompts)
        right = alike(graph.found.hidden, expected.hidden, self.model.dtype)
        if right and expected.totals is not None and graph.found.totals is not None:
            right = torch.allclose(graph.found.totals, expected.totals, rtol=1e-2, atol=1e-2)
        if right:
            known[self._about] = Answer(True, "tried: right on other tokens too")
        return right

    def _again(self, inputs: Tensor, capacity: Capacity, prompts: Sequence[int]) -> PackedOutput:
        """Run a forward whose graph went wrong."""
        self._refuse_model("a recorded forward gives something else on other tokens")
        return self._forward(inputs, capacity, prompts)
