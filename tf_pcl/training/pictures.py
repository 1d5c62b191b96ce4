"""Pictures of a network's predictions for labelled images, as figures of matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_pcl.data.class_names import escape

# With more classes, names or numbers could not be read.
_MOST_NAMES, _MOST_NUMBERS, _MOST_BARS = 40, 15, 40


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws how many images of a class (rows) were taken for which class (columns).

    Args:
      counts: how many images of class i are taken for class j, int [K, K].
      classes: the names of the classes.

    Returns:
      A matplotlib Figure.
    """
    numbers = range(len(classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(10.0, max(4.0, 0.4 * len(classes)))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    shown = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, ax=axes, label="% of the images of a class", shrink=0.8)
    axes.set(xlabel="answer", ylabel="class")
    if len(classes) <= _MOST_NAMES:
        names = [short(name) for name in classes]
        axes.set_xticks(numbers, names, rotation=90, parse_math=False)
        axes.set_yticks(numbers, names, parse_math=False)
    if len(classes) <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, size=8)
    return figure


def class_errors(counts: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws the error of each class, the largest first, of at most 40 classes.

    Args and returns as in `confusion_matrix`.
    """
    count = counts.sum(axis=1)
    wrong = count - np.diag(counts)
    errors = {i: 100 * wrong[i] / count[i] for i in range(len(classes)) if count[i]}
    worst = sorted(errors, key=lambda i: (-errors[i], i))[:_MOST_BARS]
    figure = _figure(6, 1.2 + 0.22 * len(worst))
    axes = figure.add_subplot()
    # Bars are placed by number, since two shortened names may be equal.
    bars = axes.barh(range(len(worst)), [errors[i] for i in worst])
    axes.set_yticks(range(len(worst)), [short(classes[i]) for i in worst], parse_math=False)
    axes.bar_label(bars, [f"{errors[i]:.1f} % of {count[i]}" for i in worst], padding=3, size=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    cut = len(worst) < len(errors)
    title = "Error by class" + f", the {len(worst)} worst of {len(errors)}" * cut
    axes.set(xlabel="error in %", title=title)
    return figure


def short(name: str, length: int = 20) -> str:
    """Returns the name of a class as a line that fits into a picture."""
    line = escape(name)
    return line if len(line) <= length else line[: length - 1] + "…"


def pixels(figure: Any) -> np.ndarray:
    """Returns the pixels of a figure, uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _figure(width: float, height: float) -> Any:
    # pyplot would choose a window system and keep all figures.
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")
