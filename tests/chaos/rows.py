"""What a row of the table is."""

import dataclasses


@dataclasses.dataclass
class Row:
    fault: str
    #: How often the fault was done.
    runs: int
    #: Whether everything held that must; None where it could not be tried here, which the detail says.
    held: bool | None
    detail: str
    figures: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def judged(fault, runs, problems, detail, **figures):
    """A row that holds if there is no problem."""
    text = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return Row(fault, runs, not problems, f"{text} | {detail}" if problems else detail, figures)
