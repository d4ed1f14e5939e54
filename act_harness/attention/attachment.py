"""Binding a head set to the attention modules of one model, and taking it off again."""

from __future__ import annotations

import logging
import uuid
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from act_harness.artifact import Artifact, ModelFacts, resolve_artifact
from act_harness.attention.cached import (
    Forward,
    find_cache,
    recall,
    refuse_changed,
    remember,
    seen_tokens,
)
from act_harness.attention.calls import (
    forward_arguments,
    read_shape,
    refuse_tracing,
    refuse_unsupported_forward,
    wants_maps,
)
from act_harness.attention.computing import full_precision, refuse_backward
from act_harness.attention.facts import base_model, model_facts
from act_harness.attention.generation import Guard, guard
from act_harness.attention.interface import BINDING, interface_name, register, stock_kernel
from act_harness.attention.packed import active_packing
from act_harness.attention.probe import Probe
from act_harness.counters import PromptRecord
from act_harness.engines import select_engine
from act_harness.engines.operation import (
    CallCounter,
    Engine,
    Geometry,
    LayerState,
    Report,
    Stock,
)
from act_harness.engines.ragged import SegmentEngine
from act_harness.engines.reference import selected_maps
from act_harness.engines.torch import TorchEngine
from act_harness.errors import InternalError, UnsupportedCallError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from act_harness.calibration import LayerPlan
    from act_harness.engines.ragged import RaggedOutput, Room, Segments

__all__ = ["Attachment", "attach", "calibrated", "detach", "prepare", "stock_model"]

_logger = logging.getLogger(__name__)


class _Binding:
    """What a selected attention module carries: its plan, and the attachment it belongs to."""

    def __init__(self, attachment: Attachment, layer: int, plan: LayerPlan) -> None:
        self.attachment, self.layer, self.plan = attachment, layer, plan
        engine = attachment.engine
        self.segment_engine = engine if isinstance(engine, SegmentEngine) else None
        self.cache: Cache | None = None  # the cache that the forward under way gave the layer

    def note_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention module; the interface itself is not told the cache."""
        self.cache = find_cache(args, kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        stock: Stock,
        stock_maps: Callable[[], Tensor | None],
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`act_harness.attention.interface.BoundLayer`."""
        owner, forward = self.attachment, self._forward()
        cache = self.cache if forward.cache is None else forward.cache
        again = forward.again(cache, self.layer, mask=mask, query=query, key=key, owner=owner.token)
        state: LayerState | None
        if again is not None:
            geometry, state = again[1], again[0].state
        else:
            seen = seen_tokens(cache, self.layer, query.shape[2])
            state, real = recall(cache, self.layer, seen, owner=owner.token, batch=query.shape[0])
            geometry = forward.geometry(key, mask, seen, real)
            forward.note(cache, mask, key, geometry, real)
            if key.shape[2] > geometry.columns:  # a static cache; a view costs a step time
                key, value = key[:, :, : geometry.columns], value[:, :, : geometry.columns]
        maps = None
        if forward.maps and stock.kernel == "eager":
            maps = self._maps(stock_maps(), query, key, geometry, state, scale, softcap)
        output, state = self.compute(
            query, key, value, geometry=geometry, state=state, stock=stock, scale=scale,
            softcap=softcap,
        )  # fmt: skip
        if again is not None:
            again[0].keep(cache, self.layer, state, geometry.real)
        else:
            remember(cache, self.layer, state, geometry.real, owner=owner.token)
        return output, maps

    def _maps(
        self,
        maps: Tensor | None,
        query: Tensor,
        key: Tensor,
        geometry: Geometry,
        state: LayerState | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor | None:
        """Return the stock's (B, H, C, K) maps with those of the selected heads calibrated."""
        if maps is None:
            return None
        found = selected_maps(
            query, key, geometry=geometry, plan=self.plan, state=state, scale=scale, softcap=softcap
        )
        maps = maps.clone()
        heads = torch.tensor(self.plan.heads, device=maps.device)
        held = found.calibrated[..., geometry.first_column :]
        maps[:, heads, :, : geometry.columns] = held.to(maps.dtype)
        return maps

    def compute(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        geometry: Geometry,
        state: LayerState | None,
        stock: Stock,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, LayerState | None]:
        """See :class:`act_harness.attention.packed.PackedLayer`."""
        owner = self.attachment
        forward = self._forward()
        owner.calls.add(owner.engine.name)
        with full_precision(query.device.type, stock) as own:
            result = owner.engine(
                query,
                key,
                value,
                geometry=geometry,
                plan=self.plan,
                state=state,
                stock=own,
                scale=scale,
                softcap=softcap,
            )
        if result.report is not None:
            owner.note_report(self.layer, result.report, geometry.prompt)
        forward.reached.add(self.layer)
        output = result.output
        if torch.is_grad_enabled() and query.requires_grad:
            output = refuse_backward(output, owner.engine)
        return output, result.state

    def takes_segments(self, room: Room) -> bool:
        """See :class:`act_harness.attention.packed.PackedLayer`."""
        engine = self.segment_engine
        return engine is not None and engine.takes_segments(self.plan, room)

    def calibrate_segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stock: RaggedOutput,
        *,
        segments: Segments,
        prompts: Sequence[int],
        scale: float,
    ) -> None:
        """See :class:`act_harness.attention.packed.PackedLayer`."""
        owner, engine = self.attachment, self.segment_engine
        if engine is None:
            raise InternalError(f"engine {owner.engine.name} does not calibrate packed segments")
        owner.calls.add(owner.engine.name)
        report = engine.calibrate_segments(
            query, key, value, stock, segments=segments, plan=self.plan, scale=scale
        )
        owner.note_report(self.layer, report, prompts)
        self._forward().reached.add(self.layer)

    def _forward(self) -> Forward:
        if self.attachment.forward is None:
            raise InternalError("a calibrated layer was called outside its decoder's forward")
        return self.attachment.forward


class Attachment:
    """Calibrated attention of one model: made and checked once, switched on and off at will.

    It is on from :func:`attach` until :meth:`detach`, or inside :meth:`engaged`. The attachments of
    a model are a stack that lies on its decoder: the one switched on last is in force, alone, and
    the one below it is again when it goes. One without heads is the stock model.
    """

    def __init__(self, model: PreTrainedModel, artifact: Artifact | None, engine: Engine) -> None:
        """Store what :func:`prepare` found; nothing in the model changes yet."""
        self.model = base_model(model)
        self.artifact = artifact
        self.engine = engine
        self.plans: dict[int, LayerPlan] = artifact.plans() if artifact else {}
        self.calls = CallCounter()
        """How many layers each engine has computed."""
        self.reports: dict[int, Report] = {}
        """What the latest forward with a prompt did, by layer."""
        self.token = uuid.uuid4().hex
        """Names this attachment on the caches that it fills."""
        self._reported: Tensor | Sequence[int] = ()
        self.forward: Forward | None = None
        """The decoder forward under way."""
        self._given: Cache | None = None  # the cache that it was given
        self._prompts: Tensor | None = None
        self._tokens: Tensor | None = None
        self._watcher: list[list[PromptRecord]] | None = None
        self._decoder: Any = self.model.get_decoder()
        self._base = ""  # the stock kernel, while this is in force
        self._bindings: list[tuple[nn.Module, _Binding]] = []
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
        """Have this in force inside the block, whatever was before it, which comes back after."""
        if self._stack[-1:] == [self]:
            yield
            return
        self._push()
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

    def takes_segments(self, room: Room) -> bool:
        """Whether all layers calibrate segments of such a room (packed forwards on a device)."""
        engine = self.engine
        return isinstance(engine, SegmentEngine) and all(
            engine.takes_segments(plan, room) for plan in self.plans.values()
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

    @property
    def _stack(self) -> list[Attachment]:
        """The attachments of this model, that in force last."""
        found: list[Attachment] = self._decoder.__dict__.get(_STACK, [])
        return found

    def _push(self) -> None:
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
        for module, binding in self._bindings:
            setattr(module, BINDING, binding)
        self._guards = guard(self.model)
        self._base = base
        _live.add(self)
        decoder.config._attn_implementation_internal = register(base)

    def _remove(self) -> None:
        """Undo :meth:`_install`, or as much of it as was done."""
        self._listen(False)
        for hook in self._hooks:
            hook.remove()
        for module, _ in self._bindings:
            module.__dict__.pop(BINDING, None)
        for one in self._guards:
            one.remove()
        _live.discard(self)
        config = self._decoder.config
        if config._attn_implementation_internal == interface_name(self._base) and not any(
            other._decoder.config is config for other in _live
        ):
            config._attn_implementation_internal = self._base
        self._hooks, self._guards, self._base = [], [], ""

    def _check(self) -> None:
        """Find the layers and try them, on the stock model and then calibrated."""
        config = self._decoder.config
        probe = Probe(self.model)
        with stock_model(self.model):
            base = stock_kernel(config)
            before = probe.hidden()
            name = config._attn_implementation_internal
            config._attn_implementation_internal = register(base)
            try:
                modules = probe.attention_modules(before)
            finally:
                config._attn_implementation_internal = name
        self._bind(modules)
        with self.engaged():
            probe.check(self)
        self.calls = CallCounter()
        self.reports = {}

    def _bind(self, modules: dict[int, tuple[nn.Module, int]]) -> None:
        kind = type(self.model).__name__
        for layer, plan in self.plans.items():
            if layer not in modules:
                raise UnsupportedModelError(
                    f"layer {layer} of {kind} does not pass through transformers' attention "
                    f"interface (these do: {sorted(modules)}); take it out of the head set"
                )
            module, heads = modules[layer]
            if max(plan.heads) >= heads:
                raise UnsupportedModelError(
                    f"layer {layer} of {kind} has heads 0..{heads - 1}, "
                    f"the head set names {max(plan.heads)}"
                )
            self._bindings.append((module, _Binding(self, layer, plan)))

    # -- one forward -------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_tracing()
        packing = active_packing()
        given = forward_arguments(module, args, kwargs)
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
            maps=wants_maps(module, given),
        )
        self.reports = {}
        self._given = None if given.get("use_cache") is False else find_cache(args, kwargs)
        if self._given is not None:
            refuse_changed(self._given)
        if self._hands_on:
            self.forward.cache = self._given
        self._listen(self.forward.cache is None and packing is None)

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
            raise InternalError(
                f"layers {missing} ran without calibration: something switched the attention "
                "implementation after attaching; detach and attach again"
            )
        if self._watcher is not None and self.reports:
            self._watcher.append(self.records())


_STACK = "_act_harness_attachments"
"""Attribute of a decoder: the attachments of its model, that in force last."""

_live: weakref.WeakSet[Attachment] = weakref.WeakSet()
"""Attachments whose interface name stands in a configuration; configurations may be shared."""


def _totals(reports: Sequence[Report]) -> Tensor:
    """(B, 7) float64: the layers' reports summed over heads, as a record has them."""
    device = reports[0].facts.device
    facts = torch.cat([report.facts.to(device) for report in reports], dim=2)
    both = torch.cat([facts, (facts[:1] > 0).to(facts.dtype)])  # (7, B, heads of all layers)
    return both.sum(dim=2, dtype=torch.float64).roll(1, dims=0).T


def prepare(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Attachment:
    """Return an attachment that was checked on its model and is off; see :func:`attach`."""
    found = resolve_artifact(artifact, facts or model_facts(model, tokenizer))
    if isinstance(engine, str):
        engine = select_engine(engine, device=model.device.type)
    attachment = Attachment(model, found, engine)
    if attachment.plans:
        attachment._check()
        _logger.info(
            "calibrated attention: %s, %d heads in %d layers, engine %s",
            found.name if found else None,
            found.head_count() if found else 0,
            len(attachment.plans),
            engine.name,
        )
    return attachment


def attach(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Attachment:
    """Calibrate a model's attention until the returned attachment is detached.

    What was attached before is covered, not mixed with: the last one is in force alone, and the
    one before it again after it was detached. :func:`detach` undoes all. A copy or pickle of a
    calibrated model is calibrated too, with its own weights.

    Args:
        model: a loaded causal language model on the ``sdpa`` or ``eager`` kernel.
        artifact: an artifact, its path, the name of a shipped one, or None / ``"none"`` for the
            stock model.
        tokenizer: checked against the artifact when given.
        engine: ``auto``, the name of an engine, or an engine.
        facts: what identifies the model, where that is known already.

    Raises:
        ArtifactError: unknown, malformed, or for another model.
        UnsupportedModelError: the model cannot be calibrated; it is left as it was.
    """
    attachment = prepare(model, artifact, tokenizer=tokenizer, engine=engine, facts=facts)
    attachment._push()
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Give a model its own attention back: take off all that is attached, by whom ever.

    For attachments whose handle was lost, and for copies of calibrated models. Does nothing to a
    stock model.
    """
    decoder = base_model(model).get_decoder()
    while stack := decoder.__dict__.get(_STACK):
        stack[-1].detach()


@contextmanager
def stock_model(model: PreTrainedModel) -> Iterator[None]:
    """Run the stock model inside the block, whatever is attached to it."""
    with Attachment(model, None, TorchEngine()).engaged():
        yield


@contextmanager
def calibrated(
    model: PreTrainedModel,
    artifact: Artifact | str | Path | None,
    *,
    tokenizer: Any = None,  # noqa: ANN401 - any transformers tokenizer
    engine: str | Engine = "auto",
    facts: ModelFacts | None = None,
) -> Iterator[Attachment]:
    """Calibrate a model's attention inside a ``with`` block; see :func:`attach`.

    Blocks nest: the inner one is in force alone, also where it is the stock model (None).
    """
    attachment = attach(model, artifact, tokenizer=tokenizer, engine=engine, facts=facts)
    try:
        yield attachment
    finally:
        attachment.detach()
