"""Pictures of how a network answers on the test images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_pcl.data.class_names import escape

# With more classes, names or numbers would not be read.
_MOST_NAMES, _MOST_NUMBERS, _MOST_BARS = 40, 15, 40


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws how many images of a class (rows) were taken for which class (columns).

    Args:
      labels: class numbers, int [N].
      predicted: the network's answers, int [N].
      classes: the names of the classes.

    Returns:
      uint8 [H, W, 3].
    """
    from sklearn import metrics

    numbers = range(len(classes))
    counts = metrics.confusion_matrix(labels, predicted, labels=numbers)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(10.0, max(4.0, 0.4 * len(classes)))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    shown = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, ax=axes, label="% of the images of a class", shrink=0.8)
    axes.set(xlabel="answer", ylabel="class", title="Test images")
    if len(classes) <= _MOST_NAMES:
        axes.set_xticks(numbers, _short(classes), rotation=90)
        axes.set_yticks(numbers, _short(classes))
    if len(classes) <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, size=8)
    return _pixels(figure)


def class_errors(labels: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws the error of each class, the largest first, of at most 40 classes.

    Args and returns as in `confusion_matrix`.
    """
    wrong = np.bincount(labels[labels != predicted], minlength=len(classes))
    count = np.bincount(labels, minlength=len(classes))
    errors = {i: 100 * wrong[i] / count[i] for i in range(len(classes)) if count[i]}
    worst = sorted(errors, key=lambda i: (-errors[i], i))[:_MOST_BARS]
    figure = _figure(6, 1.2 + 0.22 * len(worst))
    axes = figure.add_subplot()
    # At numbers and not at names, of which two may be alike when they are cut.
    places, names = range(len(worst)), _short([classes[i] for i in worst])
    bars = axes.barh(places, [errors[i] for i in worst], tick_label=names)
    axes.bar_label(bars, [f"{errors[i]:.1f} % of {count[i]}" for i in worst], padding=3, size=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    cut = len(worst) < len(errors)
    title = "Test error by class" + f", the {len(worst)} worst of {len(errors)}" * cut
    axes.set(xlabel="error in %", title=title)
    return _pixels(figure)


def _short(names: Sequence[str], length: int = 20) -> list[str]:
    # A dollar sign begins mathematics in matplotlib.
    lines = [escape(name) for name in names]
    cut = [name if len(name) <= length else name[: length - 1] + "…" for name in lines]
    return [name.replace("$", r"\$") for name in cut]


def _figure(width: float, height: float) -> Any:
    # Not through pyplot, which would choose a window system and keep all figures.
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")


def _pixels(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
