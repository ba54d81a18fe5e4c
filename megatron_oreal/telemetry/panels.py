"""The drawing of ``report.png``: six panels of one run, with matplotlib and nothing that knows about files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_oreal.telemetry import names
from megatron_oreal.telemetry.records import STEP, Record, top_level_phases

# Okabe and Ito's palette, told apart with every common colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#BBBBBB"
PHASE_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
TEXT_COLOUR, FAINT = "#222222", "#8A8A8A"
MARKERS_UP_TO = 40
SMOOTHED_FROM = 100
_TICK_STEPS = (1, 2, 2.5, 5, 10)

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": TEXT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "axes.edgecolor": "#B0B0B0",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 5.0,
    "axes.titlecolor": "#555555",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


class Run:
    """The records of a run as arrays over steps."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = sorted(records, key=lambda record: record[STEP])
        self.steps = np.array([record[STEP] for record in self._records])

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that have the metric and its values; what is not finite is NaN, a gap in the line."""
        found = [(record[STEP], record[metric]) for record in self._records if metric in record]
        steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    def phases(self) -> list[str]:
        """Top-level phases, the longest first."""
        return top_level_phases(self._records)


def draw(records: Sequence[Record], title: str, subtitle: str) -> FigureCanvasAgg:
    """Draw the whole figure, ready for ``canvas.print_png``. ``records`` must not be empty."""
    run = Run(records)
    with rc_context(STYLE):
        figure = Figure(figsize=(16, 10), dpi=120, facecolor="white")
        canvas = FigureCanvasAgg(figure)
        figure.text(0.045, 0.965, title, fontsize=16, fontweight="bold", va="center")
        figure.text(0.045, 0.935, subtitle, fontsize=10.5, color="#555555", va="center")
        if any(len(run.series(metric)[0]) >= SMOOTHED_FROM for metric in names.REGISTRY):
            note = (
                f"from {SMOOTHED_FROM} points on: thin line as logged, thick line its centred mean over 1/30 of the run"
            )
            figure.text(0.985, 0.935, note, fontsize=8.5, color=FAINT, ha="right", va="center")
        grid = figure.add_gridspec(2, 3, left=0.045, right=0.985, top=0.855, bottom=0.055, wspace=0.17, hspace=0.36)
        for place, panel in enumerate((_evaluation, _training, _losses, _policy, _responses, _times)):
            panel(figure, grid[place], run)
        return canvas


def _evaluation(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    (axes,) = _panel(figure, cell, run, "Held-out pass@1", 1)
    low_steps, low = run.series(names.EVAL_PASS_AT_1_LOW)
    high_steps, high = run.series(names.EVAL_PASS_AT_1_HIGH)
    if len(low) and np.array_equal(low_steps, high_steps):
        axes.fill_between(low_steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
        if len(low) == 1:
            axes.vlines(low_steps, low, high, color=BLUE, alpha=0.4, linewidth=5)
    rates = ((names.EVAL_PASS_AT_1, "sampled", BLUE), (names.EVAL_GREEDY, "greedy", VERMILION))
    _lines(axes, run, "pass@1", rates, smooth=False)
    _percent(axes)


def _training(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    top, bottom = _panel(figure, cell, run, "Training prompts", 2)
    _lines(top, run, "pass rate", ((names.PASS_RATE, "pass rate", BLUE),))
    _percent(top)
    _lines(bottom, run, "kept groups", ((names.GROUPS_KEPT, "kept groups", GREEN),))
    bottom.set_ylim(bottom=0)


def _losses(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    top, bottom = _panel(figure, cell, run, "Losses", 2)
    terms = (
        (names.LOSS_TOTAL, "total", GREY),
        (names.LOSS_POSITIVE, "positive", BLUE),
        (names.LOSS_NEGATIVE, "negative", VERMILION),
        (names.LOSS_KL, "KL", GREEN),
    )
    _lines(top, run, "policy terms", terms)
    _lines(bottom, run, f"reward model [{_unit(names.LOSS_REWARD_MODEL)}]", ((names.LOSS_REWARD_MODEL, "", PURPLE),))


def _policy(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    top, bottom = _panel(figure, cell, run, "Policy", 2)
    _lines(top, run, f"KL to reference [{_unit(names.KL_TO_REFERENCE)}]", ((names.KL_TO_REFERENCE, "", GREEN),))
    _lines(bottom, run, f"entropy [{_unit(names.ENTROPY)}]", ((names.ENTROPY, "", BLUE),))


def _responses(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    top, bottom = _panel(figure, cell, run, "Responses", 2)
    lengths = ((names.LENGTH_MEAN, "mean", BLUE), (names.LENGTH_MAX, "longest", GREY))
    _lines(top, run, f"length [{_unit(names.LENGTH_MEAN)}]", lengths)
    top.set_ylim(bottom=0)
    _lines(bottom, run, "truncated", ((names.TRUNCATED_SHARE, "", VERMILION),))
    _percent(bottom)


def _times(figure: Figure, cell: SubplotSpec, run: Run) -> None:
    """Stacked bars a step wide: the longest phases by name, the others in one, and what no timer saw."""
    (axes,) = _panel(figure, cell, run, "Time per step", 1)
    axes.set_title("seconds")
    phases = run.phases()
    shown = [(name.removeprefix(names.TIME), [name]) for name in phases[: len(PHASE_COLOURS)]]
    if len(phases) > len(PHASE_COLOURS):
        shown.append(("smaller phases", phases[len(PHASE_COLOURS) :]))
    if len(run.series(names.TIME_OTHER)[0]):
        shown.append(("other", [names.TIME_OTHER]))
    if not shown:
        _no_data(axes)
        return
    first, last = int(run.steps[0]), int(run.steps[-1])
    edges = np.arange(first, last + 2) - 0.5
    base = np.zeros(len(edges) - 1)
    colours = dict(zip((label for label, _ in shown), PHASE_COLOURS, strict=False))
    colours |= {"smaller phases": YELLOW, "other": GREY}
    for label, members in shown:
        height = np.zeros_like(base)
        for member in members:
            steps, values = run.series(member)
            height[steps.astype(int) - first] += np.nan_to_num(values)
        axes.stairs(base + height, edges, baseline=base, fill=True, color=colours[label], label=label, linewidth=0)
        base = base + height
    axes.set_ylim(0, max(base.max() * 1.04, 1e-9))
    # On the right the legend can have the order of the stack; the axes give it as much room as its names need.
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), reverse=True)
    box, needed = axes.get_position(), legend.get_window_extent().width / figure.bbox.width
    axes.set_position((box.x0, box.y0, max(box.width - needed - 0.01, box.width / 3), box.height))


def _panel(figure: Figure, cell: SubplotSpec, run: Run, title: str, rows: int) -> list[Axes]:
    """One panel: ``rows`` axes on top of each other that share their steps, so that no axis carries two scales."""
    grid = cell.subgridspec(rows, 1, hspace=0.3)
    axes = [figure.add_subplot(grid[row]) for row in range(rows)]
    box = cell.get_position(figure)
    figure.text(box.x0, box.y1 + 0.038, title, fontsize=12, fontweight="bold", va="center")
    first, last = float(run.steps[0]), float(run.steps[-1])
    margin = max(1.0, 0.02 * (last - first))
    for each in axes:
        each.set_xlim(first - margin, last + margin)
        each.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=(1, 2, 5, 10), min_n_ticks=1))
        if first == last:
            each.set_xticks([first])
        each.yaxis.set_major_locator(MaxNLocator(nbins=7 if rows == 1 else 4, steps=_TICK_STEPS))
        each.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        each.tick_params(length=0)
        each.tick_params(axis="x", labelbottom=each is axes[-1])
    axes[-1].set_xlabel("step")
    return axes


def _lines(axes: Axes, run: Run, label: str, series: Sequence[tuple[str, str, str]], smooth: bool = True) -> None:
    """Draw (metric, legend entry, colour) series that share a unit; several of them get a legend above the axes."""
    axes.set_title(label)
    drawn = 0
    for metric, entry, colour in series:
        steps, values = run.series(metric)
        if np.isnan(values).all():
            continue
        drawn += 1
        marker = "o" if len(steps) <= MARKERS_UP_TO else ""
        if smooth and len(steps) >= SMOOTHED_FROM:
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.8)
            values = _centred_mean(values, len(values) // 60)
        axes.plot(steps, values, color=colour, label=entry, marker=marker, markersize=4, markeredgewidth=0)
    if not drawn:
        _no_data(axes)
    elif len(series) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=len(series) + 1)


def _centred_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over ``reach`` points on both sides, fewer at the ends, NaN left out; NaN stays where the value is NaN."""
    window = np.ones(2 * reach + 1)
    known = ~np.isnan(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(float), window, mode="same")
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def _percent(axes: Axes) -> None:
    """Shares in percent: within [0, 1], and never so close that noise of a percent looks like a slope."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    if not axes.has_data():
        return
    low, high = axes.get_ylim()
    centre = (low + high) / 2
    low, high = min(low, centre - 0.05), max(high, centre + 0.05)
    axes.set_ylim(max(low, -0.01), min(high, 1.01))


def _no_data(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=FAINT, fontsize=11)
    axes.set_yticks([])
    axes.grid(False)


def _unit(metric: str) -> str:
    return names.describe(metric).unit
