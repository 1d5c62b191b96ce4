"""Which splits of a data set are trained and tested on, by their names."""

from collections.abc import Collection

from tf_pcl.errors import UserError

TRAIN = "train"
# Names of a test split; of several that are there, the first is taken.
TEST = ("test", "val", "validation")


def train_and_test(
    splits: Collection[str], where: str, layout: str, parameter: str = ""
) -> tuple[str, str]:
    """Returns the names of the training and of the test split.

    Args:
      splits: the names of all splits that have labelled images.
      where: what has these splits, for the text of the error.
      layout: how the splits should be laid out, for the text of the error.
      parameter: the name of the parameter whose value `where` is, if it is one.

    Raises:
      UserError: if one of the two is missing.
    """
    test = next((name for name in TEST if name in splits), None)
    if TRAIN not in splits or not test:
        found = f"splits {', '.join(sorted(splits))}" if splits else "no images"
        raise UserError(
            f"{'it' if parameter else where} has {found}: it needs train and test (or val, "
            f"validation), as {layout}",
            parameter=parameter or None,
            value=where,
        )
    return TRAIN, test
