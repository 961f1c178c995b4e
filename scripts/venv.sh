#!/bin/sh
# Create a virtual environment at $1 with the first Python >= 3.11 that has the required modules. Install the linker
# that cargo needs if it is missing.
set -eu
. "$(dirname "$0")/debian.sh"

usable() {
    # PATH may contain a pyenv shim for a version that is not installed, so run the program.
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
# Debian packages the modules for virtual environments separately.
python=$(find_python) || { can_install && install_packages python3-venv; }
python=$(find_python) || {
    echo "no Python >= 3.11 with the venv and ensurepip modules in PATH (Debian: apt-get install python3-venv)" >&2
    exit 1
}
"$python" -m venv --clear "$1"
