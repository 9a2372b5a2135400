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
        if side in self.errors:
            return None
        figures = [result[figure] for result in self.results.get(side, []) if result[figure] is not None]
        return statistics.median(figures) if figures else None

    def best(self, side):
        """The speed of the fastest update of all repetitions."""
        return max((result["best_tokens_per_s"] for result in self.results.get(side, [])), default=None)

    def eager_side(self):
        """The faster of the two optimizers counts."""
        return max(EAGER_OPTIMIZERS, key=lambda side: self.median(side, "tokens_per_s") or 0)


def row_of(measurements, num_runs):
    """One row, which stands for itself."""
    case = measurements.case
    eager = measurements.eager_side()
    sides = {"ours": "ours", "eager": eager, "compiled": "compiled"}
    speeds = {name: measurements.median(side, "tokens_per_s") for name, side in sides.items()}
    peaks = {name: measurements.median(side, "peak_bytes") for name, side in sides.items()}
    flops = flops_per_token(case)
    products_flops_per_s = measurements.median("products", "flops_per_s")
    ours = measurements.results["ours"]
    return (
        asdict(case)
        | {"runs": num_runs, "device_name": ours[0]["device_name"] if ours else None}
        | {f"{name}_tokens_per_s": speed for name, speed in speeds.items()}
        | {f"{name}_best_tokens_per_s": measurements.best(side) for name, side in sides.items()}
        | {f"{name}_peak_bytes": peak for name, peak in peaks.items()}
        | {f"{name}_error": measurements.errors.get(side) for name, side in sides.items()}
        | {
            "eager_optimizer": EAGER_OPTIMIZERS[eager] if speeds["eager"] else None,
            "eager_fused_tokens_per_s": measurements.median("eager_fused", "tokens_per_s"),
            "eager_unfused_tokens_per_s": measurements.median("eager_unfused", "tokens_per_s"),
            "speed_over_eager": ratio(speeds["ours"], speeds["eager"]),
            "speed_over_compiled": ratio(speeds["ours"], speeds["compiled"]),
            "peak_over_eager": ratio(peaks["ours"], peaks["eager"]),
            "peak_over_compiled": ratio(peaks["ours"], peaks["compiled"]),
            "frozen_weight_bytes": frozen_weight_bytes(case),
            "flops_per_token": flops,
            "products_flops_per_s": products_flops_per_s,
            "square_product_flops_per_s": measurements.median("products", "square_flops_per_s"),
        }
        | {f"{name}_products_frac": share(speed, flops, products_flops_per_s) for name, speed in speeds.items()}
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
    ("ours", 8, "ours_peak_bytes", "mib"),
    ("eager", 8, "eager_peak_bytes", "mib"),
    ("compiled", 9, "compiled_peak_bytes", "mib"),
    ("/eager", 7, "peak_over_eager", "{:.2f}"),
    ("ours", 6, "ours_products_frac", "{:.0%}"),
    ("eager", 6, "eager_products_frac", "{:.0%}"),
    ("comp.", 6, "compiled_products_frac", "{:.0%}"),
]
NAME_WIDTH = 48


def table_head():
    groups = f"{'':{NAME_WIDTH}}{'tokens/s':>25}{'speed':>14}{'peak, MiB':>25}{'':>7}{'of products':>18}"
    headings = "".join(f"{heading:>{width}}" for heading, width, _, _ in COLUMNS)
    return f"{groups}\n{'':{NAME_WIDTH}}{headings}"


def table_line(name, row):
    return f"{name:{NAME_WIDTH}}" + "".join(
        f"{shown(row[field], pattern):>{width}}" for _, width, field, pattern in COLUMNS)


def shown(value, pattern):
    if value is None:
        return "–"
    return f"{value / 2**20:.0f}" if pattern == "mib" else pattern.format(value)
