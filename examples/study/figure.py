"""One figure an experiment: every setting's paired differences to the reference, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.study.compare import paired
from examples.study.design import Experiment
from examples.study.tables import FIGURES, Rows

SHOWN = ("Pass@8", "distinct correct")
INK, ACCENT = "#57606a", "#0969da"  # read on light and on dark pages


def write(experiment: Experiment, groups: Sequence[Rows], path: Path) -> bool:
    """Write an SVG; False (and nothing written) where no setting has two seeds in common with the reference."""
    reference = next((rows for rows in groups if rows.name == experiment.reference), None)
    if reference is None:
        return False
    pairs = [(rows, sorted(rows.by_seed.keys() & reference.by_seed.keys())) for rows in groups if rows is not reference]
    pairs = [(rows, seeds) for rows, seeds in pairs if len(seeds) > 1]
    if not pairs:
        return False
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from eopd.stages.report.charts import svg_text

    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.5, 0.7 + 0.26 * len(pairs)), layout="constrained")
        axes = figure.subplots(1, len(SHOWN), sharey=True)
        for axis, name in zip(axes, SHOWN, strict=True):
            for place, (rows, seeds) in enumerate(reversed(pairs)):
                estimate = paired(rows.stacked(seeds, FIGURES[name]), reference.stacked(seeds, FIGURES[name]))
                assert estimate.interval is not None
                color = ACCENT if estimate.excludes_zero else INK
                axis.plot([estimate.interval.low, estimate.interval.high], [place, place], color=color, linewidth=1.5)
                axis.plot([estimate.mean], [place], "o", color=color, markersize=4)
            axis.axvline(0.0, color=INK, linewidth=0.8)
            axis.set_yticks(range(len(pairs)), [rows.name for rows, _ in reversed(pairs)])
            axis.set_title(f"{name}, against {reference.name}", color=INK, fontsize=9)
            axis.tick_params(colors=INK)
            for side, spine in axis.spines.items():
                spine.set_visible(side == "bottom")
                spine.set_color(INK)
        path.write_text(svg_text(figure, experiment.name, transparent=True), encoding="utf-8")
    return True
