#!/usr/bin/env bash
# One environment for everything: system libraries, .venv, requirements.txt. Running it again skips what is done. Used by demo.sh and test.sh.
# --no-system: go on without system libraries that are missing, where you are not root. Training and serving want of them only venv, and to compile
# g++ and python3-dev; demo.sh, test.sh and eval.py want a renderer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# libosmesa6, libegl1, libgl1: MuJoCo's renderers; libglib2.0-0: OpenCV, which robosuite imports; g++ and python3-dev: torch.compile; python3-venv: .venv
packages=(libosmesa6 libegl1 libgl1 libglib2.0-0 python3-venv python3-dev g++)
missing=()
if command -v dpkg-query >/dev/null; then
    for package in "${packages[@]}"; do
        { dpkg-query -W -f '${Status}\n' "$package" "${package}t64" 2>/dev/null || true; } | grep "ok installed" >/dev/null || missing+=("$package") # t64: Ubuntu's
    done
else
    echo "not a Debian system: see to it that OSMesa or EGL, GLib, a C++ compiler and Python's venv are installed" >&2
fi
if [ "${#missing[@]}" -gt 0 ] && [ "${1:-}" = --no-system ]; then
    echo "going on without ${missing[*]}" >&2
elif [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "error: system libraries are missing; type: sudo apt-get install -y ${missing[*]}  (or, without them: ./setup.sh --no-system)" >&2
        exit 2
    fi
    echo "installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi

python=$(command -v python3.11 || command -v python3)
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
    echo "error: $python is $("$python" --version), but Python 3.11 or 3.12 is needed: install python3.11 and its venv package" >&2
    exit 2
fi
stamp="$("$python" --version) $(cat requirements.txt requirements-no-deps.txt | sha256sum | cut -d' ' -f1)"
if [ "$(cat .venv/.installed 2>/dev/null || true)" != "$stamp" ]; then
    echo "installing requirements.txt into .venv (once; some 9 GB, most of it torch's CUDA libraries)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --quiet --requirement requirements.txt
    .venv/bin/python -m pip install --quiet --no-deps --requirement requirements-no-deps.txt
    echo "$stamp" >.venv/.installed
fi
