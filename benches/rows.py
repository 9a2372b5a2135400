"""Rows of the results: the medians of what was measured, and their ratios."""

import statistics
from dataclasses import asdict

from .cases import flops_per_token, frozen_weight_bytes

EAGER_OPTIMIZERS = {"eager_fused": "fused", "eager_unfused": "unfused"}


class Measurements:
    """What each side of one case gave, repetition by repetition. A side that failed once is not tried again."""

    def __init__(self, case, sides):
        self.case = case
        self.results = {side: [] for side in sides}
        self.errors = {}

    def median(self, side, figure):
        """None for a side that failed, or was not measured, and for a figure that it does not have."""
        figures = self._figures(side, figure)
        return statistics.median(figures) if figures else None

    def best(self, side, figure):
        return max(self._figures(side, figure), default=None)

    def _figures(self, side, figure):
        if side in self.errors:
            return []
        return [result[figure] for result in self.results.get(side, []) if result[figure] is not None]

    def compared_sides(self, speed):
        """Name in a row -> side. Of eager PyTorch it is the one whose optimizer gives the higher speed."""
        eager = max(EAGER_OPTIMIZERS, key=lambda side: self.median(side, speed) or 0)
        return {"ours": "ours", "eager": eager, "compiled": "compiled"}


def row_of(measurements, num_runs):
    """One row, which stands for itself."""
    case, ours = measurements.case, measurements.results.get("ours")
    sides = measurements.compared_sides("tokens_per_s")
    cpu_sides = measurements.compared_sides("tokens_per_cpu_s")
    speeds = {name: measurements.median(side, "tokens_per_s") for name, side in sides.items()}
    cpu_speeds = {name: measurements.median(side, "tokens_per_cpu_s") for name, side in cpu_sides.items()}
    peaks = {name: measurements.median(side, "peak_bytes") for name, side in sides.items()}
    products = {figure: measurements.median("products", figure)
                for figure in ("flops_per_s", "flops_per_cpu_s", "square_flops_per_s")}
    flops = flops_per_token(case)
    return (
        asdict(case)
        | {"runs": num_runs, "device_name": ours[0]["device_name"] if ours else None}
        | {f"{name}_tokens_per_s": speed for name, speed in speeds.items()}
        | {f"{name}_best_tokens_per_s": measurements.best(side, "best_tokens_per_s") for name, side in sides.items()}
        | {f"{name}_tokens_per_cpu_s": speed for name, speed in cpu_speeds.items()}
        | {f"{name}_peak_bytes": peak for name, peak in peaks.items()}
        | {f"{name}_error": measurements.errors.get(side) for name, side in sides.items()}
        | {
            "eager_optimizer": EAGER_OPTIMIZERS[sides["eager"]] if speeds["eager"] else None,
            "eager_fused_tokens_per_s": measurements.median("eager_fused", "tokens_per_s"),
            "eager_unfused_tokens_per_s": measurements.median("eager_unfused", "tokens_per_s"),
            "library_tokens_per_s": measurements.median("library", "tokens_per_s"),
            "library_best_tokens_per_s": measurements.best("library", "best_tokens_per_s"),
            "library_peak_bytes": measurements.median("library", "peak_bytes"),
            "library_error": measurements.errors.get("library"),
            "speed_over_eager": ratio(speeds["ours"], speeds["eager"]),
            "speed_over_compiled": ratio(speeds["ours"], speeds["compiled"]),
            "cpu_speed_over_eager": ratio(cpu_speeds["ours"], cpu_speeds["eager"]),
            "cpu_speed_over_compiled": ratio(cpu_speeds["ours"], cpu_speeds["compiled"]),
            "peak_over_eager": ratio(peaks["ours"], peaks["eager"]),
            "peak_over_compiled": ratio(peaks["ours"], peaks["compiled"]),
            "frozen_weight_bytes": frozen_weight_bytes(case),
            "flops_per_token": flops,
        }
        | {f"products_{figure}": rate for figure, rate in products.items()}
        | {f"{name}_products_frac": share(speed, flops, products["flops_per_s"]) for name, speed in speeds.items()}
        | {f"{name}_products_cpu_frac": share(speed, flops, products["flops_per_cpu_s"])
           for name, speed in cpu_speeds.items()}
    )


def ratio(a, b):
    return a / b if a and b else None


def share(tokens_per_s, flops, flops_per_s):
    """How much of the rate of matrix products a side reaches."""
    return tokens_per_s * flops / flops_per_s if tokens_per_s and flops_per_s else None


COLUMNS = [
    # heading, width, field, format
    ("ours", 8, "ours_tokens_per_s", "{:.0f}"),
    ("eager", 8, "eager_tokens_per_s", "{:.0f}"),
    ("compiled", 9, "compiled_tokens_per_s", "{:.0f}"),
    ("/eager", 7, "speed_over_eager", "{:.2f}"),
    ("/comp.", 7, "speed_over_compiled", "{:.2f}"),
    ("/eager", 7, "cpu_speed_over_eager", "{:.2f}"),
    ("/comp.", 7, "cpu_speed_over_compiled", "{:.2f}"),
    ("ours", 8, "ours_peak_bytes", "mib"),
    ("eager", 8, "eager_peak_bytes", "mib"),
    ("compiled", 9, "compiled_peak_bytes", "mib"),
    ("/eager", 7, "peak_over_eager", "{:.2f}"),
    ("weights", 8, "frozen_weight_bytes", "mib"),
    ("ours", 6, "ours_products_frac", "{:.0%}"),
    ("eager", 6, "eager_products_frac", "{:.0%}"),
    ("comp.", 6, "compiled_products_frac", "{:.0%}"),
]
NAME_WIDTH = 48


def table_head():
    groups = f"{'':{NAME_WIDTH}}{'tokens/s':>25}{'speed':>14}{'per CPU s':>14}{'peak, MiB':>25}{'':>7}"
    groups += f"{'frozen':>8}{'of products':>18}"
    headings = "".join(f"{heading:>{width}}" for heading, width, _, _ in COLUMNS)
    return f"{groups}\n{'':{NAME_WIDTH}}{headings}"


def table_line(name, row):
    line = f"{name:{NAME_WIDTH}}" + "".join(
        f"{shown(row[field], pattern):>{width}}" for _, width, field, pattern in COLUMNS)
    if row["library_tokens_per_s"]:  # only where it was asked for, and so it has no column
        line += f"  library: {row['library_tokens_per_s']:.0f}, {shown(row['library_peak_bytes'], 'mib')} MiB"
    return line


def shown(value, pattern):
    if value is None:
        return "–"
    return f"{value / 2**20:.0f}" if pattern == "mib" else pattern.format(value)
