"""What pip is asked for on each platform, and in_venv.sh, which needs no network here."""

import configparser
import os
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pages import ROOT

LINUX = {"sys_platform": "linux", "platform_system": "Linux"}
INTEL = {**LINUX, "platform_machine": "x86_64"}
LINUX_ARM = {**LINUX, "platform_machine": "aarch64"}
WINDOWS = {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64"}
MAC = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text):
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def asked_for(requirements, python, platform, **more):
    """{name: specifier} of what pip takes there; a name comes once."""
    environment = {**platform, "python_version": python, "python_full_version": python + ".0"}
    found = {}
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({**environment, **more}):
            assert requirement.name not in found, (python, platform, requirement.name)
            found[requirement.name] = requirement.specifier
    return found


PLATFORMS = [
    ("3.9", INTEL, "classic", True),
    ("3.11", INTEL, "classic", True),
    ("3.11", MAC, "classic", True),
    ("3.11", LINUX_ARM, "classic", False),
    ("3.11", WINDOWS, "classic", False),
    ("3.12", INTEL, "current", False),
    ("3.13", INTEL, "current", False),
    ("3.13", LINUX_ARM, "current", False),
    ("3.13", MAC, "current", False),
]


@pytest.mark.parametrize(("python", "platform", "stack", "addons"), PLATFORMS)
def test_python_and_platform_choose_the_stack(python, platform, stack, addons):
    options = setup_cfg()["options"]
    assert Version(python) in Requirement("x" + options["python_requires"]).specifier
    found = asked_for(lines(options["install_requires"]), python, platform)
    tensorflow, other = {"classic": ("2.15.1", "2.21.0"), "current": ("2.21.0", "2.15.1")}[stack]
    assert tensorflow in found["tensorflow"] and other not in found["tensorflow"]
    # tf-keras of another minor version than TensorFlow's does not work with it.
    assert tensorflow in found["tf-keras"] and other not in found["tf-keras"]
    assert ("tensorflow-addons" in found) == addons
    assert ("tensorboard" in found) == (stack == "current")
    cuda = asked_for(
        lines(setup_cfg()["options.extras_require"]["cuda"]), python, platform, extra="cuda"
    )
    assert cuda == {"tensorflow": found["tensorflow"]}


@pytest.mark.parametrize("stack", ["classic", "current"])
def test_constraints_hold_what_is_asked_for(stack):
    """Every version is in setup.cfg's range, and nothing that is asked for is missing."""
    text = (ROOT / f"constraints-{stack}.txt").read_text()
    pythons = re.findall(r"3\.\d+", text.splitlines()[0])
    asked = setup_cfg()
    for python in pythons:
        pins = asked_for(lines(text), python, INTEL)
        # TF_PCL_STACK=current asks for the same from Python 3.10 on (setup.py).
        version = "3.12" if stack == "current" else python
        required = asked_for(lines(asked["options"]["install_requires"]), version, INTEL)
        for extra in ("onnx", "test"):
            wanted = lines(asked["options.extras_require"][extra])
            required.update(asked_for(wanted, version, INTEL, extra=extra))
        for name, specifier in required.items():
            (pin,) = pins[name.replace("_", "-")]
            assert pin.version in specifier, (python, name)
    assert (
        pythons
        == {"classic": ["3.9", "3.10", "3.11"], "current": ["3.10", "3.11", "3.12", "3.13"]}[stack]
    )


def requirements_of_setup_py(tmp_path, stack):
    """What setup.py asks for with TF_PCL_STACK; the error instead if it refuses.

    It sees what in_venv.sh links into the environment, and nothing else.
    """
    linked = re.search(r"for part in (.*); do ln", (ROOT / "in_venv.sh").read_text()).group(1)
    for name in linked.split():
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_PCL_STACK": stack},
    )
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return (tmp_path / "tf_pcl.egg-info" / "requires.txt").read_text()


def test_the_current_stack_can_be_asked_for_from_python_3_10_on(tmp_path):
    if sys.version_info < (3, 10):
        assert "needs Python 3.10 to 3.13" in requirements_of_setup_py(tmp_path, "current")
    else:
        text = requirements_of_setup_py(tmp_path, "current")
        assert 'python_version >= "3.10"]\ntensorboard' in text and "3.12" not in text


def test_an_unknown_stack_is_refused(tmp_path):
    assert requirements_of_setup_py(tmp_path, "newest") == (
        "TF_PCL_STACK=newest: give one of classic, current"
    )


# A stand-in for Python 3.minor. It says whether it is in the range that in_venv.sh asks for, makes
# an environment of itself, and writes down what pip is called with.
STUB = """#!/bin/sh
case "$*" in
    --version) echo "Python 3.{minor}.0" ;;
    *"import ensurepip"*) for last; do before=$first; first=$last; done
        [ {minor} -ge $before ] && [ {minor} -le $last ] ;;
    *"version_info < (3, 12)"*) [ {minor} -ge 12 ] ;;
    *venv\\ --clear*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"
        echo "prompt = '$5'" >"$last/pyvenv.cfg" ;;
    *"--target"*) exit 1 ;;
    *"pip install"*) echo "$TF_PCL_STACK: $*" >>"$(dirname "$0")/../pip" ;;
esac
"""


class Machine:
    """A checkout and a PATH that holds the stubs and a few tools alone."""

    def __init__(self, folder):
        self.checkout, self.tools, self.home = (
            folder / name for name in ("a checkout", "tools", "home")
        )
        for made in (self.checkout, self.tools, self.home):
            made.mkdir(parents=True)
        for name in "sh cat cksum cp dirname grep ln ls mkdir mktemp rm uname".split():
            (self.tools / name).symlink_to(shutil.which(name))
        for name in (
            "in_venv.sh",
            "setup.cfg",
            "setup.py",
            *(p.name for p in ROOT.glob("constraints-*")),
        ):
            (self.checkout / name).write_text((ROOT / name).read_text())

    def python(self, minor, name="python3", folder=None):
        (folder or self.tools).mkdir(parents=True, exist_ok=True)
        self.script(name, STUB.replace("{minor}", str(minor)), folder)

    def script(self, name, text, folder=None):
        path = (folder or self.tools) / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command, cwd=None, **env):
        env = {"PATH": str(self.tools), "HOME": str(self.home), **env}
        return subprocess.run(
            ["sh", str(self.checkout / "in_venv.sh"), *(command or ("python", "--version"))],
            cwd=cwd or self.checkout,
            capture_output=True,
            text=True,
            env={name: value for name, value in env.items() if value is not None},
        )


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def refused(done):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("in_venv.sh: ") and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("minor", "env", "stack"),
    [
        (9, {}, "classic"),
        (11, {}, "classic"),
        (12, {}, "current"),
        (13, {}, "current"),
        (11, {"TF_PCL_STACK": "current"}, "current"),
        (11, {"HOME": None}, "classic"),
    ],
)
def test_the_python_chooses_the_stack_and_its_constraints(machine, minor, env, stack):
    machine.python(minor)
    done = machine.run(**env)
    assert done.returncode == 0 and done.stdout == f"Python 3.{minor}.0\n", done.stderr
    assert done.stderr.count("\n") == 1 and f"{stack} stack" in done.stderr
    venv = machine.checkout / (".venv-current" if "TF_PCL_STACK" in env else ".venv")
    (called,) = (venv / "pip").read_text().splitlines()
    assert called.startswith(f"{stack}: ") and f"constraints-{stack}.txt" in called
    again = machine.run(**env)
    assert (again.returncode, again.stderr) == (0, "")
    assert (venv / "pip").read_text().count("\n") == 1  # pip was not called again


def test_extras_are_added_to_the_environment(machine):
    machine.python(11)
    machine.run()
    assert machine.run("--with=test", "python", "--version").stderr == ""
    first, second = (machine.checkout / ".venv" / "pip").read_text().splitlines()
    assert "project --constraint" in first and "project[test] --constraint" in second


def test_the_newest_python_that_fits_is_taken_where_python3_does_not(machine):
    machine.python(8)
    machine.python(10, "python3.10")
    for minor in (9, 12):
        folder = machine.home / f".pyenv/versions/3.{minor}.4/bin"
        machine.python(minor, folder=folder)
    assert machine.run().stdout == "Python 3.12.0\n"
    assert machine.run(TF_PCL_STACK="classic").stdout == "Python 3.10.0\n"


def test_tf_pcl_venv_names_the_folder_and_the_checkout_is_left_alone(machine, tmp_path):
    machine.python(11)
    before = sorted(machine.checkout.iterdir())
    done = machine.run(cwd=tmp_path, TF_PCL_VENV="my environments/one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my environments/one/pip").exists()
    assert sorted(machine.checkout.iterdir()) == before


def test_a_folder_of_others_is_not_cleared(machine, tmp_path):
    machine.python(11)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    assert "mine was not made by this script" in refused(
        machine.run(TF_PCL_VENV=str(tmp_path / "mine"))
    )
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_environment_of_a_moved_checkout_is_made_anew(machine):
    machine.python(11)
    machine.run()
    moved = machine.checkout.rename(machine.checkout.with_name("moved"))
    machine.checkout = moved
    done = machine.run()
    assert done.returncode == 0 and "making" in done.stderr


def test_refusals_of_in_venv(machine):
    machine.python(11)
    assert "no command given" in refused(machine.run("--with=test"))
    assert "TF_PCL_STACK=new: give classic or current" in refused(machine.run(TF_PCL_STACK="new"))
    assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize("minor", [8, 14])
def test_python_of_other_versions_is_refused_in_one_line(machine, minor):
    """Neither uv nor a pip that brings it is there."""
    machine.python(minor)
    said = refused(machine.run())
    assert (
        "3.9 to 3.13" in said and f"Python 3.{minor}.0" in said and "install Python or uv" in said
    )
    assert not (machine.checkout / ".venv").exists()


def test_uv_fetches_a_python_where_none_fits(machine):
    machine.python(14)
    fetched = machine.home / "fetched"
    machine.python(13, "python3.13", fetched)
    machine.script(
        "uv",
        f"""#!/bin/sh
case "$*" in
    "python install --quiet 3.13") ;;
    "python find 3.13") echo "{fetched}/python3.13" ;;
    *) exit 1 ;;
esac
""",
    )
    done = machine.run()
    assert done.returncode == 0 and done.stdout == "Python 3.13.0\n", done.stderr
    assert "uv fetches Python 3.13" in done.stderr


# A stand-in for in_venv.sh in .ci/run. The classic stack is the default; the other may be missing.
IN_VENV = """
echo "${TF_PCL_STACK:-default}: $*" >>calls
case "$*" in
    *sys.executable*) echo /other/python ;;
    *"-m pytest"*) echo "reads $TF_PCL_OTHER_PYTHON" >>calls; echo "3 passed" ;;
    *FAILS*) echo "a wrong line"; exit 1 ;;
esac
[ -z "${TF_PCL_STACK:-}" ] || exit STATUS
"""


@pytest.mark.parametrize(
    ("other", "fails", "status"),
    [
        (0, "nothing", 0),
        (2, "nothing", 0),  # no Python for it
        (1, "nothing", 1),  # pip failed
        (0, "mypy", 1),
    ],
)
def test_ci_runs_every_part_and_says_how_it_ended(other, fails, status, tmp_path):
    (tmp_path / ".ci").mkdir()
    for name in (".ci/run", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    stub = IN_VENV.replace("STATUS", str(other)).replace("FAILS", fails)
    (tmp_path / "in_venv.sh").write_text(stub)
    env = {k: v for k, v in os.environ.items() if not k.startswith("TF_PCL_")}
    done = subprocess.run(
        ["bash", str(tmp_path / ".ci/run")], capture_output=True, text=True, env=env
    )
    assert done.returncode == status, done.stderr
    printed = re.search(r"^## Test\n+```sh\n(.*)\n```", (ROOT / "README.md").read_text(), re.M)
    calls = (tmp_path / "calls").read_text().splitlines()
    whole = printed.group(1).replace("sh in_venv.sh", "default:")
    assert calls[calls.index(whole) + 1] == ("reads " if other else "reads /other/python")
    quick = "current: --with=test python -m pytest -m not slow"
    assert (quick in calls) == (not other)
    tools = ["ruff check", "ruff format --check", "mypy tf_pcl"]
    assert [c for c in calls if "--with=lint" in c] == [f"default: --with=lint {t}" for t in tools]
    *lines, of_other, of_default = done.stdout.splitlines()[-5:]
    for tool, line in zip(tools, lines):
        assert line.startswith("FAILED" if fails in tool else "passed") and tool in line
    assert of_default.startswith(f"passed  {printed.group(1)}") and "3 passed" in of_default
    said = {0: "3 passed", 1: "FAILED  The current stack", 2: "No Python here for the current"}
    assert said[other] in of_other
