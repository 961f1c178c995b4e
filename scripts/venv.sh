#!/bin/sh
# Make a virtual environment at $1 with the first Python >= 3.11 that can, and see that the linker cargo needs is there.
set -eu
. "$(dirname "$0")/debian.sh"

usable() {
    # A pyenv shim may stand in PATH for a version that is not installed: only running it tells.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

need cc gcc libc6-dev
# Debian ships python3 without the modules that make environments.
python=$(find_python) || { can_install && install_packages python3-venv; }
python=$(find_python) || {
    echo "no Python >= 3.11 with the venv and ensurepip modules in PATH (Debian: apt-get install python3-venv)" >&2
    exit 1
}
"$python" -m venv --clear "$1"
