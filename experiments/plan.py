"""Which runs are wanted, in which order: pure functions of the definition and of what has been found.

Tuning comes first, method by method; then the seeds that count go round the rows, so that a table
that is not finished has every row at as many seeds as possible.
"""

from .definition import Run, has_warm_start


def missing_runs(definition, losses):
    """The runs that are known to be wanted and have no loss yet. More follow as long as a rate is not tuned."""
    tuning_seed = definition.tuning["seed"]
    runs = []
    for row in definition.rows:
        if _waits_for_warm_start_rate(definition, row, losses):
            continue
        missing_rates, _ = tune(definition, row, losses)
        runs += [Run(row, rate, tuning_seed) for rate in missing_rates]
    for seed in definition.seeds:
        for row in definition.rows:
            rate = tuned_rate(definition, row, losses)
            if rate is None or _waits_for_warm_start_rate(definition, row, losses):
                continue
            if (run := Run(row, rate, seed)) not in losses:
                runs.append(run)
    return runs


def tuned_rate(definition, row, losses):
    """The learning rate of a row's counted runs; None while it is not known."""
    return tune(definition, definition.rows[row].get("rate_of", row), losses)[1]


def warm_start_rate(definition, losses):
    """The learning rate of every warm start; None while it is not known."""
    return tuned_rate(definition, definition.document["warm_start_rate_of"], losses)


def tune(definition, row, losses):
    """The rates that still have to be tried, and the best one once there are none.

    A best rate at an end of the grid asks for the next rate beyond it. A run that diverged has an
    infinite loss; of equal losses the lower rate counts.
    """
    tuning = definition.tuning
    grid = sorted(definition.rows[row].get("rates", []))
    if not grid:
        return [], None
    best = None
    for _ in range(tuning["max_extensions"] + 1):
        if missing := [rate for rate in grid if Run(row, rate, tuning["seed"]) not in losses]:
            return missing, None
        best = min(grid, key=lambda rate: losses[Run(row, rate, tuning["seed"])])
        if best == grid[0]:
            grid.insert(0, _round(best / tuning["factor"]))
        elif best == grid[-1]:
            grid.append(_round(best * tuning["factor"]))
        else:
            break
    return [], best


def tried_rates(definition, row, losses):
    """The rates of a row that were tried for tuning, each with its loss, in order."""
    seed = definition.tuning["seed"]
    return sorted((run.rate, loss) for run, loss in losses.items() if run.row == row and run.seed == seed)


def _waits_for_warm_start_rate(definition, row, losses):
    return has_warm_start(definition.row_spec(row)) and warm_start_rate(definition, losses) is None


def _round(rate):
    """The same number whether it was computed or read back."""
    return float(f"{rate:.6g}")
