"""The verbs of the command line. A verb is one file and one row here.

The file of a verb imports nothing slow, since the command line imports all of them.
"""

from tf_pcl.verbs import compare, evaluate, export, predict, report, train
from tf_pcl.verbs.verb import Verb

VERBS: dict[str, Verb] = {
    "train": train.VERB,
    "compare": compare.VERB,
    "report": report.VERB,
    "evaluate": evaluate.VERB,
    "predict": predict.VERB,
    "export": export.VERB,
}
