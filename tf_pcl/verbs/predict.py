"""tf-pcl predict: classifies image files."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from tf_pcl import compat
from tf_pcl.console import show_table
from tf_pcl.errors import Stopped, UserError
from tf_pcl.verbs.verb import Verb

if TYPE_CHECKING:
    from tf_pcl.deploy.predict import Prediction


def _define_flags() -> None:
    flags.DEFINE_integer("top_k", 3, "how many of the likeliest classes to name", lower_bound=1)
    flags.DEFINE_boolean("json", False, "print a line of JSON for each file instead of a table")


def _predict(rest: list[str]) -> None:
    if len(rest) < 2:
        raise UserError(
            f"{len(rest)} paths were given: give a network (workdir, SavedModel, .tflite or .onnx "
            "file) and after it image files, folders or patterns"
        )
    compat.import_tensorflow()
    from tf_pcl.deploy import predict, runtimes

    load = runtimes.find(rest[0])
    paths = predict.find(rest[1:])
    runtime = load()
    top_k = min(flags.FLAGS.top_k, len(runtime.classes))
    found = predict.predict(runtime, paths, top_k)
    bad = [*(_as_json(found) if flags.FLAGS.json else _as_table(found, top_k))]
    if bad:
        named = "; ".join(f"{_plain(one.path)}: {one.problem}" for one in bad[:20])
        more = f"; and {len(bad) - 20:,} more" if len(bad) > 20 else ""
        raise Stopped(f"{len(bad):,} of {len(paths):,} files cannot be used ({named}{more})")


def _plain(text: str) -> str:
    from tf_pcl.data.class_names import escape

    return escape(text)


def _as_json(found: Iterable["Prediction"]) -> Iterator["Prediction"]:
    """Prints a line for each file and yields those that cannot be used."""
    for one in found:
        line: dict[str, Any] = {"path": one.path}
        if one.problem is None:
            pairs = zip(one.classes, one.probabilities)
            line["predictions"] = [{"class": c, "probability": round(p, 6)} for c, p in pairs]
        else:
            line["error"] = one.problem
            yield one
        print(json.dumps(line), flush=True)


def _as_table(found: Iterable["Prediction"], top_k: int) -> Iterator["Prediction"]:
    """Prints a table of the files and yields those that cannot be used."""
    rows = []
    for one in found:
        if one.problem is not None:
            yield one
            continue
        pairs = zip(one.classes, one.probabilities)
        rows.append([_plain(one.path), *(f"{_plain(c)} {100 * p:.1f} %" for c, p in pairs)])
    if rows:
        show_table(["file", "class", *["next"] * (top_k - 1)], rows)


VERB = Verb(
    "Classifies images by a trained network.", _define_flags, _predict, arguments="MODEL IMAGE…"
)
