"""Every row of the table, in short. `make chaos` is the long form."""

import random

import pytest

from .processes import ROOT, Site
from .table import FAULTS

SEED = 1


@pytest.fixture(scope="module")
def site():
    with Site(ROOT / "target" / "chaos" / "short") as site:
        yield site


@pytest.mark.parametrize("name", FAULTS)
def test_the_service_survives(site, name):
    fault = FAULTS[name]
    row = fault.run(site, fault.short_runs, random.Random(f"{SEED} {name}"), **fault.short)
    print(f"{name}: {row.detail}")
    if row.held is None:
        pytest.skip(row.detail)
    assert row.held, row.detail
