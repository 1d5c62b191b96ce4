"""The pictures of an evaluation, as figures of matplotlib."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from tf_pcl.data.class_names import escape

if TYPE_CHECKING:
    from tf_pcl.deploy.evaluate import Wrong

# Above so many classes, their names or counts would run into each other.
_MOST_NAMES, _MOST_COUNTS = 50, 20


def _short(name: str, most: int = 16) -> str:
    name = escape(name)
    cut = name if len(name) <= most else name[: most - 1] + "…"
    # A dollar sign begins mathematics in matplotlib.
    return cut.replace("$", r"\$")


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draws a confusion matrix, each row in percent of its class.

    Args:
      counts: how many images of class i are taken for class j, int [K, K].
      classes: their names.
    """
    size = len(classes)
    inches = min(4 + 0.4 * size, 12)
    figure = Figure(figsize=(inches + 1, inches), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    bar = figure.colorbar(picture, shrink=0.8)
    bar.set_label("share of the class in percent")
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    if size <= _MOST_NAMES:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(size), names, rotation=90, parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
    if size <= _MOST_COUNTS:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[i, j] > 50 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def worst(wrong: "Wrong", classes: Sequence[str]) -> Figure:
    """Draws images that are confidently wrong, each with its class and what it is taken for."""
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
        said = _short(classes[wrong.predicted[place]])
        axes.set_title(
            f"{wrong.index[place]}: {_short(classes[wrong.labels[place]])}\n"
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
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
