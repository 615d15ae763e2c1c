"""Which experts text and image tokens went to: a table, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe.router import Traffic
from moe.vlm import VLM


@dataclass(frozen=True)
class Share:
    """One expert of one layer; shares are of its layer's choices of that kind of token, 0 to 1."""

    layer: int
    expert: int
    text: float
    image: float


@torch.no_grad()
def shares(
    vlm: VLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
) -> list[Share]:
    """Route a batch and count, padding left out; ranks that share experts call it together.

    Raises ValueError for a dense model.
    """
    if vlm.moe is None:
        raise ValueError("a dense model routes nothing: there is no routing to picture")
    training = vlm.training
    vlm.eval()
    try:
        spliced = vlm.splice(input_ids, attention_mask, None, pixel_values)
        traffic = Traffic.of(spliced.mask, vlm.moe, keep_choices=True)
        assert traffic is not None
        vlm.decode(spliced, traffic)
    finally:
        vlm.train(training)
    image = spliced.image.reshape(-1)
    real = spliced.mask.reshape(-1)
    table = []
    for layer, report in sorted(traffic.reports.items()):
        assert report.expert_TK is not None
        # One row a routed token: all positions, or the real ones only.
        routed = image[real] if traffic.real is not None else image
        kept = torch.ones_like(routed) if traffic.real is not None else real
        counts = [
            torch.bincount(report.expert_TK[kept & of].reshape(-1), minlength=len(report.first_E)).float()
            for of in (~routed, routed)
        ]
        text, picture = (count / count.sum().clamp(min=1) for count in counts)
        table += [
            Share(layer, e, t, i)
            for e, (t, i) in enumerate(zip(text.tolist(), picture.tolist(), strict=True))
        ]
    return table


def draw(table: list[Share], path: Path) -> None:
    """Write a PNG: one row of bars a layer, text and image side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = sorted({share.layer for share in table})
    figure = Figure(figsize=(7, 0.5 + 1.1 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for place, (layer, axis) in enumerate(zip(layers, axes, strict=True)):
        rows = [share for share in table if share.layer == layer]
        where = [share.expert for share in rows]
        axis.bar([e - 0.2 for e in where], [share.text for share in rows], 0.4, label="text")
        axis.bar([e + 0.2 for e in where], [share.image for share in rows], 0.4, label="image")
        axis.axhline(1 / len(rows), color="grey", linewidth=0.8)
        axis.set(ylabel=f"layer {layer}", ylim=(0, 1), xticks=where)
        if place == 0:
            axis.legend(ncols=2, frameon=False, loc="upper right")
    axes[-1].set_xlabel("expert; the line is an even share")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")  # whatever the name ends in
