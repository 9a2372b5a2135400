"""The results file: one JSON document per line and finished run. What is in it is never run again."""

import json
import math
import os

from scripts.local_server import Failure

from .definition import Run
from .plan import warm_start_rate

SUCCEEDED, DIVERGED, FAILED = "succeeded", "diverged", "failed"


class Results:
    """All finished runs of a file, by run; the last line of a run counts."""

    def __init__(self, path):
        self.path = path
        records = _read(path)
        self.records = {run_of(record): record for record in records}
        self.job_ids = {record["job_id"] for record in records}

    def add(self, record):
        """Appends a finished run; when this returns it is on the disk."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[run_of(record)] = record
        self.job_ids.add(record["job_id"])

    def losses(self):
        """The final validation loss of every run; infinite where there is none."""
        return {run: final_loss(record) for run, record in self.records.items()}

    def of_row(self, row, seeds, rate):
        """The runs of a row that count, in the order of the seeds."""
        runs = (Run(row, rate, seed) for seed in seeds)
        return [self.records[run] for run in runs if run in self.records]

    def failed(self):
        """Runs that failed for a reason that says nothing of the method."""
        return [record for record in self.records.values() if record["outcome"] == FAILED]

    def forget_failed(self):
        """Lets the failed runs be wanted again. Their lines stay, and are outlived by later ones."""
        self.records = {run: record for run, record in self.records.items() if record["outcome"] != FAILED}

    def check(self, definition, text_sha256):
        """Refuses to go on with runs of another text, or of a row that has been defined otherwise since."""
        for run, record in self.records.items():
            if record["text"]["sha256"] != text_sha256:
                raise Failure(f"{self.path}: {run.name} was trained on another text; give this one another --out")
            if run.row not in definition.rows:
                continue
            if record["spec"] != definition.spec(run, warm_start_rate(definition, self.losses())):
                raise Failure(f"{self.path}: {run.name} was defined otherwise then; give this definition another --out")


def run_of(record):
    return Run(record["row"], record["rate"], record["seed"])


def final_loss(record):
    return record["final"]["loss"] if record["outcome"] == SUCCEEDED else math.inf


def perplexity(record):
    """The final validation perplexity; infinite where there is none."""
    return record["final"]["perplexity"] if record["outcome"] == SUCCEEDED else math.inf


def _read(path):
    """Every record of a file; a last line that a kill cut off is removed."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise Failure(f"{path} is not a file of results: {error}") from error
