"""Calibrated attention on one model: what is in force there, and its decoder's forwards."""

from __future__ import annotations

import threading
import uuid
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_harness.artifact import Artifact
from act_harness.attention.binding import Binding
from act_harness.attention.cache import Forward, find_cache, refuse_changed
from act_harness.attention.calls import (
    as_the_caller_gave,
    forward_arguments,
    read_shape,
    refuse_tracing,
    refuse_unsupported_forward,
    wants_maps,
)
from act_harness.attention.counters import PromptRecord
from act_harness.attention.facts import base_model, decoder_of
from act_harness.attention.generation import Guard, guard
from act_harness.attention.interface import BINDING, interface_name, register, stock_kernel
from act_harness.attention.packing import active_packing
from act_harness.attention.parallel import HeadGroup, check_shared
from act_harness.attention.probe import Probe
from act_harness.attention.routes import lead, passing, release
from act_harness.attention.spans import FindSpan, SpanFinder, every_other
from act_harness.engines import refuse_unsupported
from act_harness.engines.operation import CallCounter, Engine, Report
from act_harness.engines.segments import SegmentEngine
from act_harness.engines.torch import TorchEngine
from act_harness.errors import (
    CalibrationError,
    UnsupportedCallError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from act_harness.attention.probe import FoundLayer
    from act_harness.calibration import LayerPlan
    from act_harness.engines.segments import Capacity

__all__ = ["Attachment", "stock_model"]


class Attachment:
    """Calibrated attention of one model: made and checked once, switched on and off at will.

    It is on from ``attach`` until :meth:`detach`, or inside :meth:`engaged`. The attachments of
    a model are a stack that lies on its decoder: the one switched on last is in force, alone, and
    the one below it is again when it goes. One without heads is the stock model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        artifact: Artifact | None,
        engine: Engine,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Store what ``prepare`` found; nothing in the model changes yet.

        ``tokenizer`` is needed where the artifact's target is found in text (``span``).
        """
        self.model = base_model(model)
        self.artifact = artifact
        self.engine = engine
        self.plans: dict[int, LayerPlan] = artifact.plans() if artifact else {}
        """Of the whole model; a process that holds a part of it has its part in the bindings."""
        markers = None if artifact is None else artifact.calibration.markers
        self.spans: FindSpan | None = None
        """Finds the columns of target ``span``."""
        if markers is not None and tokenizer is not None:
            self.spans = SpanFinder(tokenizer, markers)
        self.calls = CallCounter()
        """How many layers each engine has computed."""
        self.reports: dict[int, Report] = {}
        """What the latest forward with a prompt did to the heads in this process, by layer."""
        self._summed: Tensor | None = None  # of all processes that share the model
        self.token = uuid.uuid4().hex
        """Names this attachment on the caches that it fills."""
        self._reported: Tensor | Sequence[int] = ()
        self.forward: Forward | None = None
        """The decoder forward under way."""
        self._thread: int | None = None  # the one that runs it
        self._given: Cache | None = None  # the cache that it was given
        self._prompts: Tensor | None = None
        self._tokens: Tensor | None = None
        self._watcher: list[list[PromptRecord]] | None = None
        self._decoder: Any = decoder_of(self.model)
        # by thread, what a model around the decoder was given
        self._callers: dict[int, dict[str, Any]] = {}
        self._base = ""  # the stock kernel, while this is in force
        self._bindings: list[tuple[nn.Module, Binding]] = []
        self._hooks: list[Any] = []
        self._guards: list[Guard] = []
        self._listening: list[Any] = []  # hooks of the attention modules
        self._hands_on = False  # whether layers are known to get the cache that the decoder got

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a copy or a pickle holds; the original's caches are not the copy's."""
        self.__dict__.update(state)
        self.token = uuid.uuid4().hex
        if self._base:
            register(self._base)

    @property
    def active(self) -> bool:
        """Whether any head of the model is calibrated while this is on."""
        return bool(self.plans)

    @contextmanager
    def prompts(
        self, lengths: Sequence[int] | Tensor, *, tokens: Sequence[int] | Tensor | None = None
    ) -> Iterator[None]:
        """Say how many real tokens of each sequence are prompt in the prefills inside the block.

        The real tokens after them are a continuation: scored, not detected on. A length of 0
        means that everything is continuation (a rolling log-likelihood).

        Args:
            lengths: (B,) whole numbers, one for each sequence of the batch.
            tokens: (B,) real tokens of each right-padded sequence, for a forward without an
                attention mask (causality hides right pads from every real token, so the stock
                kernel needs no mask and stays on its fast path).
        """
        before = self._prompts, self._tokens
        self._prompts = torch.as_tensor(lengths)
        self._tokens = None if tokens is None else torch.as_tensor(tokens)
        try:
            yield
        finally:
            self._prompts, self._tokens = before

    @contextmanager
    def watch(self) -> Iterator[list[list[PromptRecord]]]:
        """Collect the records of every prefill inside the block, one list for each batch."""
        before, self._watcher = self._watcher, []
        try:
            yield self._watcher
        finally:
            self._watcher = before

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """Have this in force inside the block, whatever was before it, which comes back after.

        Other threads that want an arm of the model in force wait meanwhile.
        """
        with _locks.setdefault(self._decoder, threading.RLock()):
            if self._stack[-1:] == [self]:
                yield
                return
            self.push()
            try:
                yield
            finally:
                self._drop()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the stock model inside the block: the stock kernel, as if nothing were attached."""
        with stock_model(self.model):
            yield

    def records(self) -> list[PromptRecord]:
        """Return what the latest prefill did, one record for each sequence of its batch."""
        totals, told = self.totals(), self._reported
        if totals is None:
            return []
        rows = told.sum(dim=1).tolist() if isinstance(told, Tensor) else told
        return self.records_of(totals.cpu(), rows)

    def totals(self) -> Tensor | None:
        """Return (B, 7) sums over heads of what the latest prefill did, on the model's device.

        None where nothing was calibrated. Made into records by :meth:`records_of`, later where the
        device should not be waited for.
        """
        if self._summed is not None:
            return self._summed
        return _totals(list(self.reports.values())) if self.reports else None

    def records_of(self, totals: Tensor, prompts: Sequence[int]) -> list[PromptRecord]:
        """Return the records of a prefill of all layers.

        Args:
            totals: (B or more, 7) what :meth:`totals` returned, on the CPU.
            prompts: prompt tokens of each of the B sequences.
        """
        pairs = sum(len(plan.heads) for plan in self.plans.values())
        alpha = next(iter(self.plans.values())).calibration.alpha
        return [
            PromptRecord(
                pairs=pairs,
                rows=count,
                with_sink=int(line[0]),
                sinks=int(line[1]),
                few_sinks=int(line[2]),
                moved=line[3],
                few_moved=line[4],
                rows_alone=int(line[5]),
                near_threshold=line[6] > 0,
                too_short=alpha is not None and count <= alpha,
            )
            for count, line in zip(prompts, totals[: len(prompts)].tolist(), strict=True)
        ]

    def takes_segments(self, capacity: Capacity) -> bool:
        """Whether all layers calibrate segments of this capacity (packed, on a device)."""
        engine = self.engine
        return isinstance(engine, SegmentEngine) and all(
            engine.takes_segments(plan, capacity) for plan in self.plans.values()
        )

    def note_replay(self, reports: dict[int, Report], prompts: Sequence[int]) -> None:
        """Take note that a recorded forward ran again, whose layers left ``reports``."""
        self.reports, self._reported = dict(reports), prompts
        for _ in reports:
            self.calls.add(self.engine.name)

    def note_report(self, layer: int, report: Report, prompts: Tensor | Sequence[int]) -> None:
        """Keep what a layer's prefill did.

        Args:
            layer: its number.
            report: of its sequences and selected heads.
            prompts: (B, T) bool, the prompts' tokens, or how many there are of each sequence.
        """
        self.reports[layer] = report
        self._reported = prompts

    def detach(self) -> None:
        """Take this off the model; what it covered is in force again. Twice is harmless."""
        while self in self._stack:
            self._drop()

    # -- on and off --------------------------------------------------------------------------

    @staticmethod
    def stack_of(decoder: nn.Module) -> list[Attachment]:
        """Return the attachments of a model by its decoder, that in force last."""
        found: list[Attachment] = decoder.__dict__.get(_STACK, [])
        return found

    @property
    def _stack(self) -> list[Attachment]:
        return self.stack_of(self._decoder)

    def push(self) -> None:
        """Have this in force from now on, see :func:`act_harness.attention.attach`."""
        stack = self._decoder.__dict__.setdefault(_STACK, [])
        if stack:
            stack[-1]._remove()
        stack.append(self)
        try:
            self._install()
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        """Take this off the stack, from where it lies highest."""
        stack = self._stack
        places = [place for place, other in enumerate(stack) if other is self]
        if not places:
            return
        covered = places[-1] < len(stack) - 1
        del stack[places[-1]]
        if not covered:
            self._remove()
        if not stack:
            del self._decoder.__dict__[_STACK]
        elif not covered:
            stack[-1]._install()

    def _install(self) -> None:
        """Put hooks, bindings, guards and the interface's name in place."""
        if not self.plans:
            return
        decoder = self._decoder
        base = stock_kernel(decoder.config)
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        around = self.model.base_model
        if around is not decoder:
            self._hooks += [
                around.register_forward_pre_hook(self._enter, with_kwargs=True),
                around.register_forward_hook(self._leave, always_call=True),
            ]
        led = 0
        for module, binding in self._bindings:
            setattr(module, BINDING, binding)
            led += lead(module)
        self._guards = guard(self.model)
        self._base = base
        _live.add(self)
        if led < len(self._bindings):
            decoder.config._attn_implementation_internal = register(base)

    def _remove(self) -> None:
        """Undo :meth:`_install`, or as much of it as was done."""
        self._listen(False)
        for hook in self._hooks:
            hook.remove()
        for module, _ in self._bindings:
            module.__dict__.pop(BINDING, None)
            release(module)
        for one in self._guards:
            one.remove()
        _live.discard(self)
        config = self._decoder.config
        if config._attn_implementation_internal == interface_name(self._base) and not any(
            other._decoder.config is config for other in _live
        ):
            config._attn_implementation_internal = self._base
        self._hooks, self._guards, self._base = [], [], ""
        self._thread = None
        self._callers = {}

    def check(self) -> None:
        """Find the layers and try them, on the stock model and then calibrated."""
        refuse_unsupported(self.engine, self.plans.values())
        if self.spans is None and any(p.calibration.target == "span" for p in self.plans.values()):
            raise CalibrationError(
                "target 'span' looks for its markers in the text of a prompt; give the tokenizer: "
                "attach(model, artifact, tokenizer=...)"
            )
        config = self._decoder.config
        group = check_shared(self.model)
        probe = Probe(self.model)
        with stock_model(self.model):
            stock_kernel(config)
            before = probe.hidden()
            with passing(self._decoder):
                modules = probe.attention_modules(before)
        self._bind(modules, group)
        finder = self.spans
        self.spans = None if finder is None else every_other
        try:
            with self.engaged():
                probe.check(self)
        finally:
            self.spans = finder
        self.calls = CallCounter()
        self.reports, self._summed = {}, None

    def _bind(self, modules: dict[int, FoundLayer], group: HeadGroup) -> None:
        kind = type(self.model).__name__
        counts = {layer: one.heads for layer, one in modules.items()}
        held = group.held(counts, self._decoder.config)
        for layer, plan in self.plans.items():
            if layer not in modules:
                raise UnsupportedModelError(
                    f"layer {layer} of {kind} does not pass its attention on "
                    f"(these do: {sorted(modules)}); take it out of the head set"
                )
            heads = held[layer].total
            if max(plan.heads) >= heads:
                raise UnsupportedModelError(
                    f"layer {layer} of {kind} has heads 0..{heads - 1}, "
                    f"the head set names {max(plan.heads)}"
                )
            self._bindings.append((modules[layer].module, Binding(self, layer, plan, held[layer])))

    # -- one forward -------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_tracing()
        self._callers[threading.get_ident()] = forward_arguments(module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        self._callers.pop(threading.get_ident(), None)

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        refuse_tracing()
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise UnsupportedCallError(
                "another thread's forward of this model is under way, whose mask and sinks this "
                "one would mix with; run one at a time, or load a model for each thread (after an "
                "interrupt there, detach and attach again)"
            )
        self._thread = thread
        packing = active_packing()
        given = forward_arguments(module, args, kwargs)
        given = as_the_caller_gave(given, self._callers.get(thread))
        refuse_unsupported_forward(module, given, packed=packing is not None)
        batch, rows = read_shape(given)
        if self._prompts is not None and self._prompts.shape != (batch,):
            raise UnsupportedCallError(
                f"prompt lengths were given for {self._prompts.numel()} sequences, "
                f"the batch has {batch}"
            )
        self.forward = Forward(
            batch,
            rows,
            given.get("attention_mask"),
            self._prompts,
            self._tokens,
            given.get("input_ids"),
            maps=wants_maps(module, given),
        )
        self.reports, self._summed = {}, None
        self._given = None if given.get("use_cache") is False else find_cache(args, kwargs)
        if self._given is not None:
            refuse_changed(self._given)
        if self._hands_on:
            self.forward.cache = self._given
        self._listen(self.forward.cache is None and packing is None)
        if "logits_to_keep" not in kwargs:
            return None
        # Gemma 4 leaves rows out of its last layers for it, whose sinks would be those of one row
        return args, {**kwargs, "logits_to_keep": 0}

    def _listen(self, wanted: bool) -> None:
        """Have the attention modules tell their caches, or not: a hook costs a decode step time."""
        if wanted and not self._listening:
            self._listening = [
                module.register_forward_pre_hook(binding.note_cache, with_kwargs=True)
                for module, binding in self._bindings
            ]
        elif not wanted and self._listening:
            for hook in self._listening:
                hook.remove()
            self._listening = []

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            return  # refused, beside another thread's forward
        self._thread = None
        forward, self.forward = self.forward, None
        given, self._given = self._given, None
        if self._listening:
            bindings = [binding for _, binding in self._bindings]
            if output is not None and given is not None:
                self._hands_on = all(binding.cache is given for binding in bindings)
            for binding in bindings:
                binding.cache = None
        if output is None or forward is None:  # the forward failed; its own error is on its way
            return
        if len(forward.reached) < len(self.plans):
            missing = sorted(set(self.plans) - forward.reached)
            raise UnsupportedCallError(
                f"layers {missing} ran without calibration: something switched the attention "
                "implementation after attaching, or torch.compile runs the layers from a graph; "
                "detach, undo that, and attach again"
            )
        if self.reports:
            group = HeadGroup.of(self.model)
            if group.is_split:  # now, while all are here: a record may be asked for in one
                self._summed = group.summed(_totals(list(self.reports.values())))
        if self._watcher is not None and self.reports:
            self._watcher.append(self.records())


_STACK = "_act_harness_attachments"
"""Attribute of a decoder: the attachments of its model, that in force last."""

_live: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""Attachments whose interface name stands in a configuration; configurations may be shared."""

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
"""One for each decoder: held while an arm is engaged."""


def _totals(reports: Sequence[Report]) -> Tensor:
    """(B, 7) float64: the layers' reports summed over heads, as a record has them."""
    device = reports[0].facts.device
    facts = torch.cat([report.facts.to(device) for report in reports], dim=2)
    both = torch.cat([facts, (facts[:1] > 0).to(facts.dtype)])  # (7, B, heads of all layers)
    return both.sum(dim=2, dtype=torch.float64).roll(1, dims=0).T


@contextmanager
def stock_model(model: PreTrainedModel) -> Iterator[None]:
    """Run the stock model inside the block, whatever is attached to it."""
    with Attachment(model, None, TorchEngine()).engaged():
        yield
