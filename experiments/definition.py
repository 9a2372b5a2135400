"""What is trained: a definition such as table2.json is read, and turned into the spec of a run.

A spec is a chain of JSON merge patches: the definition's `spec`, the row's `parts`, the row's own
`spec`, what the runs whose singular values are computed have of their own, then rate and seed. A
definition may itself be a patch of another one, which it `extends`.
"""

import dataclasses
import hashlib
import json

from scripts.local_server import Failure


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a row of the tables at one learning rate and one seed."""

    row: str
    rate: float
    seed: int

    @property
    def name(self):
        return f"{self.row} rate {self.rate:g} seed {self.seed}"


class Definition:
    """A definition file with its defaults resolved."""

    def __init__(self, name, document):
        self.name = name
        self.document = document
        self.rows = document["rows"]
        self.seeds = document["seeds"]
        self.tuning = document["tuning"]
        self.tokenization = document["tokenization"]
        self.spectra = document["spectra"]

    def spec(self, run, warm_start_rate):
        """What is posted for a run, but for the data. The warm start's rate counts only where there is one."""
        spec = self.row_spec(run.row)
        optimizer = {"learning_rate": run.rate}
        if has_warm_start(spec):
            optimizer["warm_start_learning_rate"] = warm_start_rate
        if self.needs_spectra(run):
            spec = merge_patch(spec, self.spectra["rows"][run.row])
        return merge_patch(spec, {"seed": run.seed, "optimizer": optimizer})

    def row_spec(self, row):
        """What all runs of a row have in common."""
        spec = self.document["spec"]
        for part in self.rows[row].get("parts", []):
            spec = merge_patch(spec, self.document["parts"][part])
        return merge_patch(spec, self.rows[row].get("spec", {}))

    def needs_spectra(self, run):
        """Whether the singular values of a run's change are computed."""
        return run.row in self.spectra["rows"] and run.seed == self.spectra["seed"]


def read(path):
    """Reads a definition file and those that it extends."""
    return Definition(path.name, _read_document(path))


def _read_document(path):
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read as a definition: {error}") from error
    base = document.pop("extends", None)
    return document if base is None else merge_patch(_read_document(path.parent / base), document)


def has_warm_start(spec):
    return spec["method"].get("warm_start_steps", 0) > 0


def merge_patch(target, patch):
    """RFC 7396: objects merge, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def spec_sha256(spec):
    """The same for equal specs, however they are written."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
