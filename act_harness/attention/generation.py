"""Refusals for ``generate()``: what would break the calibration without anyone noticing."""

from __future__ import annotations

from typing import Any

from act_harness.errors import UnsupportedCallError

__all__ = ["refuse_unsupported_generation"]


def refuse_unsupported_generation(model: Any, arguments: dict[str, Any]) -> None:  # noqa: ANN401
    """Check the settings of one ``generate`` call before it starts.

    Args:
        model: the model, for its default ``generation_config``.
        arguments: the keyword arguments of the call.

    Raises:
        UnsupportedCallError: the call would chunk the prefill, reorder or crop the cache under the
            statistics, or do without a cache.
    """
    config = arguments.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:  # noqa: ANN401 - settings are of any type
        value = arguments.get(name)
        return getattr(config, name, None) if value is None else value

    if setting("prefill_chunk_size") is not None:
        raise UnsupportedCallError(
            "prefill_chunk_size would let each chunk see only the sinks of the chunks before it; "
            "generate without it while attention is calibrated"
        )
    beams = setting("num_beams") or 1
    if beams > 1:
        raise UnsupportedCallError(
            f"num_beams={beams} reorders the cache under the calibration's statistics; "
            "use num_beams=1 (greedy or sampling) while attention is calibrated"
        )
    if setting("use_cache") is False:
        raise UnsupportedCallError(
            "use_cache=False would make every step a new prefill with other sinks; "
            "generate with the cache while attention is calibrated"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if setting(name) is not None:
            raise UnsupportedCallError(
                f"{name} (assisted generation) crops the cache under the calibration's "
                "statistics; generate without it while attention is calibrated"
            )
