"""What the counted runs of a row come to, and whether one row is better than another: pure functions."""

import dataclasses
import math
import statistics

from .plan import tuned_rate
from .results import DIVERGED, FAILED, SUCCEEDED, perplexity

NOT_RUN = "not run yet"


@dataclasses.dataclass(frozen=True)
class Summary:
    """Final validation perplexities of one row at its tuned rate, by seed; infinite where a run diverged."""

    rate: float | None
    by_seed: dict
    num_failed: int = 0

    @property
    def finite(self):
        return [value for value in self.by_seed.values() if math.isfinite(value)]

    @property
    def num_diverged(self):
        return len(self.by_seed) - len(self.finite)

    @property
    def mean(self):
        """Over all seeds, so infinite as soon as one diverged."""
        return statistics.fmean(self.by_seed.values()) if self.by_seed else math.nan

    @property
    def std(self):
        """The sample's standard deviation over the seeds that did not diverge; None for fewer than two."""
        return statistics.stdev(self.finite) if len(self.finite) > 1 else None

    @property
    def spread(self):
        """From the best seed to the worst of those that did not diverge."""
        return max(self.finite) - min(self.finite) if self.finite else 0.0


@dataclasses.dataclass(frozen=True)
class Ordering:
    """Whether `better` has the lower mean perplexity."""

    verdict: str
    gap: float | None = None
    spread: float | None = None
    num_seeds_agree: int = 0
    num_seeds: int = 0

    @property
    def holds(self):
        return self.verdict.startswith("holds")


def summarise(definition, results, row):
    """The summary of a row's counted runs."""
    rate = tuned_rate(definition, row, results.losses())
    records = results.of_row(row, definition.seeds, rate) if rate is not None else []
    counted = [record for record in records if record["outcome"] in (SUCCEEDED, DIVERGED)]
    num_failed = sum(record["outcome"] == FAILED for record in records)
    return Summary(rate, {record["seed"]: perplexity(record) for record in counted}, num_failed)


def compare(better, worse):
    """Compares the means of two summaries; the gap counts if it exceeds the larger of the two spreads."""
    if not better.by_seed or not worse.by_seed:
        return Ordering(NOT_RUN)
    seeds = better.by_seed.keys() & worse.by_seed.keys()
    num_agree = sum(better.by_seed[seed] < worse.by_seed[seed] for seed in seeds)
    if math.isinf(better.mean) and math.isinf(worse.mean):
        return Ordering("undecided: both diverged", None, None, num_agree, len(seeds))
    gap, spread = worse.mean - better.mean, max(better.spread, worse.spread)
    verdict = "holds" if gap > 0 else "does not hold"
    if min(len(better.by_seed), len(worse.by_seed)) < 2:
        verdict += "; one seed has no spread to compare with"
    else:
        verdict += ", beyond the spread" if abs(gap) > spread else ", within the spread"
    return Ordering(verdict, gap, spread, num_agree, len(seeds))
