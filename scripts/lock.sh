#!/bin/sh
# Write requirements.lock, requirements-source.lock, requirements-full.lock and requirements-release.lock: the version
# and hashes of each package for Python 3.11 to 3.14. The first is for development and CI. The second lists packages that
# are built from source with the tools of the first, the third further packages of `make test-full`, and the last the
# tools of `make release`. Locked versions stay while pyproject.toml allows them; `scripts/lock.sh --upgrade` selects the
# newest ones.
set -eu
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools/venv"
"$tools/venv/bin/pip" install --quiet 'uv>=0.9,<1'

lock() {
    output=$1
    shift
    "$tools/venv/bin/uv" pip compile "$tools/packages.in" --output-file "$output" --quiet "$@" \
        --universal --python-version 3.11 --generate-hashes --no-annotate \
        --no-emit-index-url --no-emit-find-links --custom-compile-command scripts/lock.sh
}

python3 scripts/packages.py >"$tools/packages.in"
lock requirements.lock --only-binary :all: "$@"
python3 scripts/packages.py source >"$tools/packages.in"
lock requirements-source.lock --no-deps "$@"
python3 scripts/packages.py full >"$tools/packages.in"
lock requirements-full.lock --only-binary :all: "$@"
python3 scripts/packages.py release >"$tools/packages.in"
lock requirements-release.lock --only-binary :all: "$@"
