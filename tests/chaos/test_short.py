"""Every row of the table, in short. `make chaos` is the long form."""

import random
import warnings

import pytest
from local_server import ROOT

from .faults import store
from .faults.queue import latencies
from .site import Site
from .table import FAULTS, Fault

SEED = 1
# One job goes through all that can be the matter with the store.
SHORT = {name: fault for name, fault in FAULTS.items() if name not in store.FAULTS}
SHORT["store"] = Fault(store.run_short, 1)


@pytest.fixture(scope="module")
def site():
    with Site(ROOT / "target" / "chaos" / "short", lease_s=2) as site:
        yield site


@pytest.mark.parametrize("name", SHORT)
def test_the_service_survives(site, name):
    fault = SHORT[name]
    row = fault.run(site, fault.short_runs, random.Random(f"{SEED} {name}"), **fault.short)
    print(f"{name}: {row.detail}")
    if row.held is None:
        warnings.warn(f"{name}: {row.detail}", stacklevel=1)  # which the summary shows
        pytest.skip(row.detail)
    assert row.held, row.detail


def test_the_latency_of_a_claim_begins_when_job_and_slot_are_there():
    first, second, third = (1, "first"), (2, "second"), (3, "third")
    changes = [
        (0.0, "free", "a", None), (0.0, "free", "b", None),
        (1.0, "waits", None, first), (1.1, "waits", None, second), (1.2, "waits", None, third),
        (1.3, "claimed", "a", first), (1.35, "claimed", "b", second),
        (2.0, "free", "b", None), (2.05, "claimed", "b", third),
    ]
    assert list(latencies(changes)) == pytest.approx([0.3, 0.25, 0.05])


def test_a_killed_worker_has_no_slot():
    job = (1, "job")
    changes = [
        (0.0, "free", "a", None), (0.5, "gone", "a", None), (1.0, "waits", None, job), (2.0, "free", "a", None),
        (5.0, "free", "b", None), (5.1, "claimed", "b", job),
    ]
    assert list(latencies(changes)) == pytest.approx([0.1])
