"""tf-pcl report: compares several runs."""

from absl import flags

from tf_pcl import compat, console
from tf_pcl.errors import UserError
from tf_pcl.verbs.verb import Verb


def _define_flags() -> None:
    flags.DEFINE_string("output", "report", "folder for the page and the tables")


def _report(rest: list[str]) -> None:
    if not rest:
        raise UserError("give the workdirs of runs, or folders that hold them")
    compat.import_tensorflow()
    from tf_pcl.study import report

    made = report.report(rest, flags.FLAGS.output)
    console.show(made.markdown)
    print(*made.files, sep="\n")


VERB = Verb(
    "Compares runs over seeds: tables, and a page with curves that opens offline.",
    _define_flags,
    _report,
    arguments="RUNS…",
)
