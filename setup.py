"""setup.cfg says everything but which stack is asked for where Python 3.10 or 3.11 has both.

With TF_PCL_STACK=current in the environment of pip, what setup.cfg asks for from Python 3.12 on is
asked for from 3.10 on. (An extra cannot do this: it adds requirements and takes none away.)
"""

import os
import sys

from setuptools import setup
from setuptools.config.setupcfg import read_configuration

PYTHONS = {"classic": ((3, 9), (3, 11)), "current": ((3, 10), (3, 13))}


def of_this_stack(requirements):
    return [r.replace('"3.12"', '"3.10"') if stack == "current" else r for r in requirements]


stack = os.environ.get("TF_PCL_STACK")
if stack:
    if stack not in PYTHONS:
        raise SystemExit(f"TF_PCL_STACK={stack}: give one of {', '.join(PYTHONS)}")
    first, last = PYTHONS[stack]
    if not first <= sys.version_info[:2] <= last:
        raise SystemExit(
            f"TF_PCL_STACK={stack}: this stack needs Python 3.{first[1]} to 3.{last[1]}, "
            f"and this is {sys.version_info[0]}.{sys.version_info[1]}"
        )
options = read_configuration("setup.cfg")["options"]
setup(
    # What is given here comes before setup.cfg's.
    install_requires=of_this_stack(options["install_requires"]),
    extras_require={
        name: of_this_stack(requirements)
        for name, requirements in options["extras_require"].items()
    },
)
