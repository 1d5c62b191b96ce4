"""Chooses the epoch to export and the end of a run, by the errors on validation images.

Both are functions of the rows of metrics.csv up to an epoch. So they need no state of their own,
and a resumed run decides as one that was never stopped.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

import numpy as np

from tf_pcl.data import ImageData
from tf_pcl.errors import UserError
from tf_pcl.options import Options

Rows = Sequence[Mapping[str, float]]


class Selection(NamedTuple):
    """Decides by the validation error of the deployed exit.

    Attributes:
      column: the column of metrics.csv with this error.
      best: whether the first epoch with the lowest error is exported; otherwise the last epoch is.
      patience: the epochs without improvement after which the run ends; None for no limit.
    """

    column: str
    best: bool = False
    patience: Optional[int] = None

    def lowest(self, rows: Rows) -> Optional[Mapping[str, float]]:
        """Returns the first row with the lowest error, or None if no row has one."""
        tested = [row for row in rows if self.column in row]
        # Errors are float32 numbers: metrics.csv has only as many digits as they need.
        return min(tested, key=lambda row: np.float32(row[self.column]), default=None)

    def exported(self, rows: Rows) -> Optional[Mapping[str, float]]:
        """Returns the row of the epoch to export if the run ended after these rows."""
        return self.lowest(rows) if self.best else rows[-1] if rows else None

    def step_needed(self, rows: Rows, step: int) -> Optional[int]:
        """Returns the step whose checkpoint a run that ends at `step` exports, if not the last."""
        row = self.lowest([row for row in rows if row["step"] <= step]) if self.best else None
        return int(row["step"]) if row else None

    def ends(self, rows: Rows) -> bool:
        """Returns whether the run ends after these rows, since the error no longer improves."""
        row = self.lowest(rows) if self.patience else None
        if row is None or self.column not in rows[-1]:
            return False
        return rows[-1]["epoch"] - row["epoch"] >= (self.patience or 0)


def check(options: Options, data: ImageData) -> None:
    """Checks that there are validation images for the options that need them.

    Raises:
      UserError: if there are none.
    """
    asked = {"export": options.export == "best", "early_stop": options.early_stop}
    for name in (name for name, needed in asked.items() if needed and data.validation is None):
        raise UserError(
            f"{data.name} has no validation images, and an epoch that is chosen by the test images "
            "has too low a test error: hold images out with `validation_examples=0.1`",
            parameter=name,
            value=getattr(options, name),
        )
