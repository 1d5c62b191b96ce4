#!/bin/sh
# Runs a command in the project's own environment, .venv, which the first call makes:
#     sh in_venv.sh [--with=EXTRA] COMMAND ...
# EXTRA is one of setup.cfg's extras. Needs Python 3.9, 3.10 or 3.11, which it looks for on the PATH and under pyenv and uv.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
extra=
case ${1:-} in --with=*) extra=${1#--with=}; shift ;; esac
if [ $# -eq 0 ]; then
    echo "in_venv.sh: no command given; use: sh in_venv.sh [--with=EXTRA] python train.py ..." >&2
    exit 2
fi

fits() { "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' >/dev/null 2>&1; }

# The environment is good if it was installed here, for these requirements, and its interpreter still runs.
venv=$root/.venv
stamp="$root $(cat "$root/setup.cfg" "$root/constraints.txt" | cksum)"
installed() { [ "$(cat "$venv/.installed-$1" 2>/dev/null)" = "$stamp" ] && fits "$venv/bin/python"; }

if ! installed "$extra"; then
    if ! { fits "$venv/bin/python" && grep -qsF "$root " "$venv"/.installed-*; }; then
        python=
        for candidate in python3 python3.11 python3.10 python3.9 python \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python3 \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.9.*/bin/python3 "$HOME"/.local/share/uv/python/cpython-3.11.*/bin/python3 \
            "$HOME"/.local/share/uv/python/cpython-3.10.*/bin/python3 "$HOME"/.local/share/uv/python/cpython-3.9.*/bin/python3; do
            if fits "$candidate"; then python=$candidate; break; fi
        done
        if [ -z "$python" ]; then
            echo "in_venv.sh: TensorFlow 2.15 runs on Python 3.9, 3.10 and 3.11 (with venv); found here: $(python3 --version 2>&1 || echo no python3). Install one of them and call this again." >&2
            exit 2
        fi
        echo "Making .venv with $("$python" --version); the first time this downloads about 700 MB." >&2
        "$python" -m venv --clear "$venv"
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}" --constraint "$root/constraints.txt"
    for done in "" "$extra"; do echo "$stamp" >"$venv/.installed-$done"; done
fi
PATH=$venv/bin:$PATH
export PATH
exec "$@"
