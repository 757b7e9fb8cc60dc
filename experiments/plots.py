"""Figures from records; nothing here loads a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.curves import BIN, CURVES, Rounds, bin_edges, interval, length

# Okabe-Ito and two more; an arm that is not here takes the next of the cycle
COLOURS = {
    "target": "#000000",
    "static": "#0072B2",
    "window": "#56B4E9",
    "draft": "#D55E00",
    "draft_window": "#E69F00",
    "gamma": "#009E73",
    "both": "#CC79A7",
    "lookup": "#999999",
    "memory": "#7E2F8E",
    "memory_lookup": "#8B4513",
}
LABELS = {
    "overlap": "overlap  $\\sum_x \\min(p, q)$",
    "acceptance_length": "acceptance length (bonus counted)",
    "tok_s": "tokens per second",
    "gamma": "drafted tokens a round",
    "seconds": "seconds since the start",
}


def position_figure(
    arms: Mapping[str, Mapping[str, Rounds]],
    quantities: Sequence[str],
    file: Path,
    caption: str,
    width: int = BIN,
) -> None:
    """Each quantity over the output position: every conversation's points, mean and interval.

    Args:
        arms: arm -> conversation id -> its rounds.
        quantities: of `CURVES`, one panel each.
        file: where the PNG goes; a PDF is written beside it.
        caption: below the panels: models, settings, seeds, n.
        width: of a bin, in tokens.
    """
    longest = max(length(c) for a in arms.values() for c in a.values())
    edges = bin_edges(longest, width)
    figure, axes = plt.subplots(
        1, len(quantities), figsize=(5.2 * len(quantities), 4), squeeze=False, layout="constrained"
    )
    for axis, quantity in zip(axes[0], quantities, strict=True):
        for arm, conversations in arms.items():
            curves = [CURVES[quantity](rounds, edges) for rounds in conversations.values()]
            (line,) = axis.plot([], [], color=COLOURS.get(arm), label=arm)
            colour = line.get_color()
            for curve in curves:
                axis.plot(curve.position, curve.value, ".", color=colour, alpha=0.35, ms=4)
            bands = [interval([c.value[i] for c in curves]) for i in range(len(edges) - 1)]
            mean, low, high = zip(*bands, strict=True)
            axis.plot(curves[0].position, mean, color=colour)
            axis.fill_between(curves[0].position, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_xlabel("output position (tokens)")
        axis.set_ylabel(LABELS[quantity])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.supxlabel(caption, fontsize=8, color="#555555")
    for suffix in (".png", ".pdf"):
        figure.savefig(file.with_suffix(suffix), dpi=140)
    plt.close(figure)
