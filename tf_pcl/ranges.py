"""The ranges that numbers must lie in."""

from typing import NamedTuple, Optional, Union

from tf_pcl.errors import UserError

# The largest number of float32.
_LARGEST = 3.4e38


class Range(NamedTuple):
    """The finite numbers in [low, high] that are larger than `above`; None is no bound."""

    low: Optional[float] = None
    high: Optional[float] = None
    above: Optional[float] = None

    def check(self, parameter: str, value: Union[int, float], whole: bool = False) -> None:
        """Checks a number.

        Args:
          parameter: the name of the parameter that has it.
          value: the number.
          whole: whether all numbers of this parameter are integers; these may have any size.

        Raises:
          UserError: if the number is out of range.
        """
        fits = (
            (whole or abs(value) <= _LARGEST)  # False for NaN.
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )
        if not fits:
            bounds = (("at least", self.low), ("at most", self.high), ("more than", self.above))
            texts = [f"{text} {bound}" for text, bound in bounds if bound is not None]
            allowed = " and ".join(texts if whole else ["finite", *texts])
            raise UserError(
                f"out of range: it must be {allowed}",
                parameter=parameter,
                value=value,
                allowed=allowed,
            )


_NOT_NEGATIVE, _SHARE = Range(low=0), Range(low=0, high=1)
# Of the parameters of methods and of their `compile`, wherever they are given.
OF_PARAMETERS = {
    "temperature": Range(above=0),
    "rampup_epochs": _NOT_NEGATIVE,
    "distill_weight": _NOT_NEGATIVE,
    "distill_share": _SHARE,
    "hint_weight": _NOT_NEGATIVE,
    "ce_weight": _NOT_NEGATIVE,
    "collaboration_weight": _NOT_NEGATIVE,
    "self_weight": _NOT_NEGATIVE,
    "angle_weight": _NOT_NEGATIVE,
    "mutual_weight": _NOT_NEGATIVE,
    "ema_decay": _SHARE,
    "label_smoothing": _SHARE,
}
