"""The pictures of an evaluation in addition to those of a run, as figures of matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from tf_pcl.training.pictures import short

if TYPE_CHECKING:
    from tf_pcl.deploy.evaluate import Wrong

# The longest class name above an image.
_LETTERS = 16


def worst(wrong: "Wrong", classes: Sequence[str]) -> Figure:
    """Draws images that are confidently wrong, with their classes and the predicted ones."""
    columns = max(1, min(6, len(wrong.index)))
    rows = max(1, math.ceil(len(wrong.index) / columns))
    figure = Figure(figsize=(2 * columns, 2.5 * rows), dpi=120, layout="constrained")
    if not len(wrong.index):
        figure.text(0.5, 0.5, "no image is wrong", ha="center", va="center")
    for place, image in enumerate(wrong.images):
        axes = figure.add_subplot(rows, columns, place + 1)
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        said = short(classes[wrong.predicted[place]], _LETTERS)
        axes.set_title(
            f"{wrong.index[place]}: {short(classes[wrong.labels[place]], _LETTERS)}\n"
            f"→ {said} {100 * wrong.confidence[place]:.1f} %",
            fontsize=8,
            parse_math=False,
        )
    return figure


def corruptions(errors: Mapping[str, Sequence[float]], clean: float) -> Figure:
    """Draws the error over the strength of each corruption.

    Args:
      errors: {name: error in percent at each strength}.
      clean: the error without corruption, in percent.
    """
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, row), marker in zip(errors.items(), "osD^v"):
        axes.plot([0, *range(1, len(row) + 1)], [clean, *row], marker=marker, label=name)
    axes.set_xlabel("strength; 0: as it is")
    axes.set_ylabel("error in percent")
    # Leave room for the marker of the highest point.
    axes.set_ylim(0, 1.05 * max(clean, *map(max, errors.values()), 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
