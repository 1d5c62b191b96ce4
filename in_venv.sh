#!/bin/sh
# Runs a command in an environment of this project's own, which the first call makes:
#     sh in_venv.sh [--with=EXTRA] COMMAND ...
# EXTRA is one of setup.cfg's extras, or several between commas. Two variables choose:
#     TF_PCL_STACK  classic (TensorFlow 2.15, Python 3.9 to 3.11) or current (the newest TensorFlow, Python 3.10 to 3.13);
#                   by default that of the Python that is found, which is classic up to 3.11
#     TF_PCL_VENV   the folder of the environment; by default .venv beside this file, or .venv-STACK if a stack is chosen
# Python is looked for on the PATH and under pyenv and uv: python3 if it fits, else the newest that fits.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)

say() { echo "in_venv.sh: $1" >&2; }
refuse() { say "$1"; exit 2; }

extra=
case ${1:-} in --with=*) extra=${1#--with=}; shift ;; esac
[ $# -gt 0 ] || refuse "no command given; use: sh in_venv.sh [--with=EXTRA] python train.py ..."
chosen=${TF_PCL_STACK:-}
case $chosen in
    '') first=9 last=13 ;;
    classic) first=9 last=11 ;;
    current) first=10 last=13 ;;
    *) refuse "TF_PCL_STACK=$chosen: give classic or current" ;;
esac
venv=${TF_PCL_VENV:-$root/.venv${chosen:+-$chosen}}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac

# TensorFlow has no wheels for Macs with Intel processors from Python 3.12 on.
fits() {
    "$1" -c 'import ensurepip, platform, sys, venv
first, last = map(int, sys.argv[1:])
if sys.platform == "darwin" and platform.machine() == "x86_64":
    last = min(last, 11)
sys.exit(not (3, first) <= sys.version_info[:2] <= (3, last))' $first $last >/dev/null 2>&1
}

stack_of() {
    if [ -n "$chosen" ]; then echo "$chosen"
    elif "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then echo current
    else echo classic
    fi
}

# Sets $python; fails if there is none.
find_python() {
    pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    of_uv=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}
    python=python3
    fits "$python" && return
    minor=$last
    while [ "$minor" -ge "$first" ]; do
        for python in "python3.$minor" "$pyenv/3.$minor".*/bin/python3 "$of_uv/cpython-3.$minor".*/bin/python3; do
            fits "$python" && return
        done
        minor=$((minor - 1))
    done
    python=python
    fits "$python"
}

# Sets $python to one that uv fetches; uv itself may come by pip.
fetch_python() {
    wanted=3.$last
    case $(uname -sm) in "Darwin x86_64") wanted=3.11 ;; esac
    uv=uv
    if ! command -v uv >/dev/null 2>&1; then
        tools=$(mktemp -d) || return
        uv=$tools/bin/uv
        python3 -m pip install --quiet --quiet --disable-pip-version-check --target "$tools" uv >/dev/null 2>&1 || return
    fi
    say "no Python $range here ($found): uv fetches Python $wanted."
    python=
    "$uv" python install --quiet "$wanted" && python=$("$uv" python find "$wanted")
    [ "$uv" = uv ] || rm -rf "$tools"
    fits "$python"
}

# The environment is good if it was installed for this checkout, stack and requirements, and its interpreter still runs.
ours="$root ${chosen:-any}"
stamp="$ours $(cat "$root/setup.cfg" "$root/setup.py" "$root"/constraints-*.txt 2>/dev/null | cksum)"
installed() { [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$stamp" ] && fits "$venv/bin/python"; }

if ! installed "$extra"; then
    if ! { fits "$venv/bin/python" && grep -qsF "$ours " "$venv"/.installed-*; }; then
        if [ -n "$(ls -A "$venv" 2>/dev/null)" ] &&
            ! { grep -qs "^prompt = 'tf_pcl c" "$venv/pyvenv.cfg" || grep -qs . "$venv"/.installed-*; }; then
            refuse "$venv was not made by this script: name another folder by TF_PCL_VENV, or remove that one"
        fi
        if ! find_python; then
            range="3.$first to 3.$last with venv"
            found="python3 is $(python3 --version 2>/dev/null || echo not there)"
            fetch_python ||
                refuse "TensorFlow needs Python $range ($found), and uv could not fetch one: install Python or uv, and call this again"
        fi
        stack=$(stack_of "$python")
        say "making $venv with $("$python" --version 2>&1), $stack stack; the first time this downloads about 700 MB."
        "$python" -m venv --clear --prompt "tf_pcl $stack" "$venv"
        echo "$ours unfinished" >"$venv/.installed-"
    fi
    stack=$(stack_of "$venv/bin/python")
    # What setuptools writes lies in the environment, by way of these links: the checkout may be read-only.
    mkdir -p "$venv/project"
    for part in setup.cfg setup.py pyproject.toml README.md flags tf_pcl; do ln -sfn "$root/$part" "$venv/project/$part"; done
    # Twice quiet: errors alone. Its warnings would fill the screen of a first run.
    TF_PCL_STACK=$stack "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --editable "$venv/project${extra:+[$extra]}" --constraint "$root/constraints-$stack.txt"
    for done in "" "$extra"; do echo "$stamp" >"$venv/.installed-$done"; done
fi
PATH=$venv/bin:$PATH
export PATH
exec "$@"
