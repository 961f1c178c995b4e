#!/bin/sh
# pytest.sh PYTHON WORKERS [ARGUMENT...]: run tests side by side, then those that must run alone. Print the slowest 20.
set -u
python=$1
workers=$2
shift 2

# Exit code 5 of pytest: the arguments select no such test.
"$python" -m pytest --durations 20 -m "not alone" --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
together=$?
"$python" -m pytest --durations 20 -m alone "$@"
alone=$?
[ "$together$alone" != 55 ] && { [ $together = 0 ] || [ $together = 5 ]; } && { [ $alone = 0 ] || [ $alone = 5 ]; }
