#!/bin/sh
# pytest.sh PYTHON WORKERS [ARGUMENT...]: run tests in parallel, then those that must run alone. Print the slowest
# 20 tests and 20 files.
set -u
python=$1
workers=$2
shift 2
TEST_DURATIONS=$(mktemp)
export TEST_DURATIONS
trap 'rm -f "$TEST_DURATIONS"' EXIT

# Exit code 5 of pytest: the arguments select no such test.
"$python" -m pytest -m "not alone" --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
together=$?
"$python" -m pytest -m alone "$@"
alone=$?
echo "slowest 20, seconds:"
sort -rn "$TEST_DURATIONS" | head -n 20
echo "slowest 20 files, seconds:"
awk '{ split($3, id, "::"); sum[id[1]] += $1 } END { for (file in sum) printf "%8.2f %s\n", sum[file], file }' \
    "$TEST_DURATIONS" | sort -rn | head -n 20
[ "$together$alone" != 55 ] && { [ $together = 0 ] || [ $together = 5 ]; } && { [ $alone = 0 ] || [ $alone = 5 ]; }
