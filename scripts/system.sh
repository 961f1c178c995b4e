#!/bin/sh
# Install or fetch the programs that guests and tests need. A missing program is reported, but is not an error: tests
# that need it are skipped.
set -u
cd "$(dirname "$0")/.."
. scripts/debian.sh

cache=.cache
complete=yes

need qemu-system-x86_64 qemu-system-x86 || complete=no
need busybox busybox-static || complete=no
need iperf3 iperf3 || complete=no

for fetched in qemu-11/bin/qemu-system-x86_64 qemu-10/bin/qemu-system-x86_64 guest/vmlinuz prometheus/usr/bin/prometheus; do
    [ -e $cache/$fetched ] || { scripts/fetch.sh $cache || complete=no; break; }
done
# The test of report pages needs a browser; no other test does.
need chromium chromium fonts-dejavu-core || echo "the test of report pages will be skipped" >&2

if [ $complete = no ]; then
    echo "programs for guests are missing: the tests that need them will be skipped" >&2
fi
