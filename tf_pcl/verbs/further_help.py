"""Texts from the tables of methods, networks and data sets for --help, without their import.

Importing the tables takes seconds, since they import TensorFlow. A file beside this one has their
texts. After a change of the tables, this writes the file again:

    python -c "from tf_pcl.verbs import further_help; further_help.write()"
"""

import json
from importlib import resources

from absl import flags

_FILE = resources.files("tf_pcl.verbs").joinpath("further_help.json")


def complete() -> None:
    """Adds the texts of the file to the help of the flags."""
    for name, text in written().items():
        flags.FLAGS[name].help += text


def written() -> dict[str, str]:
    """Returns {flag: text} of the file."""
    texts: dict[str, str] = json.loads(_FILE.read_text(encoding="utf-8"))
    return texts


def found() -> dict[str, str]:
    """Returns {flag: text} of the present tables."""
    from tf_pcl import options
    from tf_pcl.data import datasets
    from tf_pcl.methods import METHODS
    from tf_pcl.networks import NETWORKS

    return options.further_help(METHODS, NETWORKS, datasets.described())


def write() -> None:
    """Writes the file of a checkout again."""
    with open(str(_FILE), "w", encoding="utf-8") as f:
        json.dump(found(), f, indent=1, ensure_ascii=False)
        f.write("\n")
