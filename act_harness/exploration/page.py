"""The page: one HTML file with its data and scripts inside, which asks no network for anything.

Drawn by d3 and Observable Plot, which lie in ``assets`` with their licences. Numbers are packed in
base64: mean attention as 16 bits of its square root (relative error below 0.2 % from 1/2000 on),
weights of maps as 8 bits of theirs (error below 0.004), all else as it is. What calibration does to
a row is stored as its two factors, so the page computes maps "after" by the definition.
"""

from __future__ import annotations

import base64
import html
import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from act_harness.evidence.head_effects import head_effects

if TYPE_CHECKING:
    import numpy.typing as npt

    from act_harness.artifact import Artifact

__all__ = [
    "artifact_page",
    "asset",
    "inline_frame",
    "packed",
    "packed_strengths",
    "render",
    "settings_line",
    "strengths_of",
]


def artifact_page(artifact: Artifact) -> str:
    """Return the page of an artifact: its map of heads, and the effects that its search found."""
    shape = (artifact.model.num_hidden_layers, artifact.model.num_attention_heads)
    data: dict[str, Any] = {
        "title": f"Head set {artifact.name}",
        "model": artifact.model.id,
        "artifact": artifact.name,
        "settings": settings_line(artifact.calibration.settings()),
        "worth": artifact.judgement()[0],
        "layers": shape[0],
        "heads": shape[1],
        "groups": artifact.model.num_key_value_heads or shape[1],
        **packed_strengths(*strengths_of(artifact)),
        "tokens": [],
    }
    effects = head_effects(artifact)
    if effects is not None:
        data |= {"effects": packed(effects, np.float32), "searched": True}
    return render(f"{artifact.name} - {artifact.model.id}", data)


def strengths_of(
    artifact: Artifact,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Return (L, H) strengths, NaN where a head is not in the artifact, and of its initial token.

    The latter None where that has none of its own: it is of target ``both``.
    """
    shape = (artifact.model.num_hidden_layers, artifact.model.num_attention_heads)
    strengths, initial = (np.full(shape, np.nan, np.float32) for _ in range(2))
    for layer, plan in artifact.plans().items():
        for head, own in zip(plan.heads, plan.strengths, strict=True):
            strengths[layer, head] = own.strength
            if own.gamma_initial is not None:
                initial[layer, head] = own.gamma_initial
    return strengths, initial if artifact.calibration.target == "both" else None


def packed_strengths(
    strengths: npt.NDArray[np.float32], initial: npt.NDArray[np.float32] | None
) -> dict[str, str]:
    """Return what a page is told of :func:`strengths_of`."""
    told = {"strengths": packed(strengths, np.float32)}
    return told if initial is None else told | {"initial": packed(initial, np.float32)}


def inline_frame(page: str, *, height: int = 900) -> str:
    """Return a page as an element of another one (a notebook's cell), apart from its styles."""
    return (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width:100%;height:{height}px;border:0" title="act-harness explore"></iframe>'
    )


def settings_line(settings: dict[str, Any]) -> str:
    """Return a calibration's settings as one line of text."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def packed(values: npt.NDArray[Any], kind: type[np.generic]) -> str:
    """Return an array's bytes, little endian, in base64: how the page takes numbers."""
    little = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode("ascii")


@cache
def asset(name: str) -> str:
    """Return a file of ``assets``: the look that pages share."""
    return (resources.files("act_harness.exploration") / "assets" / name).read_text("utf-8")


def render(title: str, data: dict[str, Any]) -> str:
    """Put title, data and scripts into the template.

    Data is JSON in which nothing can end its element: no text of a prompt is ever markup.
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {
        "title": html.escape(title),
        "style": asset("page.css"),
        "d3": asset("d3.min.js"),
        "plot": asset("plot.umd.min.js"),
        "script": asset("page.js"),
        "licences": html.escape(
            f"d3: {asset('LICENSE-d3.txt')}\n\nObservable Plot: {asset('LICENSE-plot.txt')}"
        ),
        "data": text,
    }
    pieces = asset("page.html").split("@@")
    return "".join(parts[one] if number % 2 else one for number, one in enumerate(pieces))
