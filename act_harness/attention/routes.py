"""How a model's attention reaches us: by the interface's name, or by a method of its modules.

Most models look a function up by the name in their configuration
(:mod:`act_harness.attention.interface`). Those of :mod:`act_harness.attention.families` do not; a
method of their attention modules is replaced, on the instance, for as long as it is needed.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from act_harness.attention.families import family_of
from act_harness.attention.interface import attend, base_of, register

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from act_harness.attention.families.family import Family

__all__ = ["lead", "passing", "release"]

_ROUTE = "_act_harness_route"


class Route:
    """What stands in place of a module's own method."""

    def __init__(self, module: nn.Module, family: Family, place: str) -> None:
        """Store what it serves.

        Args:
            module: the attention module.
            family: its family.
            place: attribute that holds the method.
        """
        self.module, self.family, self.place = module, family, place
        self.before = module.__dict__.get(place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the method's
        """Serve a call of the method."""
        door = partial(_attend, self.module, self.family.layer(self.module))
        return self.family.serve(self.module, door, *args, **kwargs)


def _attend(
    module: nn.Module,
    layer: int,
    call: Any,  # noqa: ANN401 - see Attend
    mask: Any,  # noqa: ANN401
    run: Any,  # noqa: ANN401
    *,
    dropout: float = 0.0,
    kernel: str = "eager",
) -> Any:  # noqa: ANN401
    return attend(module, call, mask, layer=layer, run=run, kernel=kernel, dropout=dropout)


def lead(module: nn.Module) -> bool:
    """Have a module's attention reach us; False where that is the interface's work.

    Harmless where it does already.
    """
    family = family_of(module)
    if family is None:
        return False
    if _ROUTE not in module.__dict__:
        # accelerate keeps a forward that it wrapped in another place, and wraps whatever is there
        wrapped = family.method == "forward" and "_old_forward" in module.__dict__
        route = Route(module, family, "_old_forward" if wrapped else family.method)
        module.__dict__[_ROUTE] = route
        module.__dict__[route.place] = route
    return True


def release(module: nn.Module) -> None:
    """Undo :func:`lead`."""
    route: Route | None = module.__dict__.pop(_ROUTE, None)
    if route is None:
        return
    if route.before is None:
        module.__dict__.pop(route.place, None)
    else:
        module.__dict__[route.place] = route.before


@contextmanager
def passing(decoder: Any) -> Iterator[None]:  # noqa: ANN401 - a transformers decoder
    """Have every attention of a decoder reach us inside the block, by whichever way it can."""
    config = decoder.config
    before = config._attn_implementation_internal
    led = [module for module in decoder.modules() if _ROUTE not in module.__dict__ and lead(module)]
    config._attn_implementation_internal = register(base_of(config._attn_implementation))
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        for module in led:
            release(module)
