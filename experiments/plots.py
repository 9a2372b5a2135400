"""The report's pictures."""

import math
import statistics

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from .compare import summarise  # noqa: E402
from .report import rows_of_table, spectra_by_row  # noqa: E402
from .results import SUCCEEDED  # noqa: E402
from .spectra import KINDS  # noqa: E402

DPI = 100
# A row has the same colour in every picture.
COLOURS = ["#000000", "#7f7f7f", "#9467bd", "#1f77b4", "#d62728", "#17becf", "#bcbd22", "#8c564b", "#2ca02c", "#ff7f0e"]


def write_plots(definition, results, docs):
    """Writes the PNG files that the report names."""
    summaries = {row: summarise(definition, results, row) for row in definition.rows}
    records = {row: results.of_row(row, definition.seeds, summaries[row].rate) for row in definition.rows}
    colours = dict(zip(definition.rows, COLOURS * len(definition.rows)))
    plot_loss(definition, records, colours, docs / "validation-loss.png")
    plot_learning_rate(definition, records, colours, docs / "learning-rate.png")
    if found := spectra_by_row(definition, results, summaries):
        plot_spectra(found, colours, docs / "spectra.png")


def plot_loss(definition, records, colours, path):
    """Validation loss, mean and range over the seeds; a triangle on a curve is a restart."""
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for panel, table in zip(panels, ("methods", "ablation")):
        for row in rows_of_table(definition, table):
            steps, mean, low, high = loss_band(records[row])
            if not steps:
                continue
            panel.plot(steps, mean, color=colours[row], label=row, linewidth=1.5)
            panel.fill_between(steps, low, high, color=colours[row], alpha=0.15, linewidth=0)
            restarts = restarts_within(records[row])
            panel.plot(restarts, np.interp(restarts, steps, mean), color=colours[row], marker="v", linestyle="")
        _limit_to_interesting(panel)
        panel.set(title=table, xlabel="update", ylabel="validation loss")
        if panel.lines:
            panel.legend(fontsize=8)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def loss_band(records):
    """Steps with mean, lowest and highest loss over the runs that succeeded, from the first update on."""
    by_step = {}
    for record in records:
        if record["outcome"] == SUCCEEDED:
            for step, loss in record["eval_loss"]:
                if step > 0 and loss is not None:
                    by_step.setdefault(step, []).append(loss)
    steps = sorted(by_step)
    return steps, *([reduce(by_step[step]) for step in steps] for reduce in (statistics.fmean, min, max))


def restarts_within(records):
    """The restarts of a row but for the one at the end, which nothing follows."""
    return records[0]["restart_steps"][:-1] if records else []


def plot_learning_rate(definition, records, colours, path):
    rows = [row for row in definition.rows if records[row]]
    num_rows = max(1, math.ceil(len(rows) / 5))
    figure, panels = pyplot.subplots(num_rows, 5, figsize=(14, 2.6 * num_rows), sharey=True, layout="constrained",
                                     squeeze=False)
    for panel in panels.flat[len(rows):]:
        panel.set_axis_off()
    for panel, row in zip(panels.flat, rows):
        panel.plot(*zip(*records[row][0]["learning_rate"]), color=colours[row], linewidth=1)
        panel.set_title(row, fontsize=9)
    figure.supxlabel("update", fontsize=9)
    figure.supylabel("learning rate", fontsize=9)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def plot_spectra(found, colours, path):
    """One panel per kind of matrix; a line is the mean over the layers of the values at each place."""
    figure, panels = pyplot.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for panel, kind in zip(panels.flat, KINDS):
        for row, record in found.items():
            means = [statistics.fmean(place) for place in zip(*record["spectra"][kind])]
            panel.semilogy(range(1, len(means) + 1), means, color=colours[row], label=row, linewidth=1.5)
        # What lies below is rounding.
        panel.set_ylim(bottom=1e-4)
        panel.set_title(kind, fontsize=10)
    panels.flat[-1].set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    panels.flat[-1].legend(handles, labels, loc="center")
    figure.supxlabel("place, largest first")
    figure.supylabel("singular value")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _limit_to_interesting(panel):
    """The fall of the first updates is much the same for all, and would hide the rest."""
    curves = [line.get_ydata() for line in panel.lines if line.get_linestyle() == "-"]
    if curves:
        lowest = min(min(curve) for curve in curves)
        highest = max(max(curve[len(curve) // 4 :]) for curve in curves)
        margin = 0.05 * (highest - lowest)
        panel.set_ylim(lowest - margin, highest + margin)
