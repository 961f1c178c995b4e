#!/bin/sh
# Install or fetch what guests and tests need. Never fails for what is missing: it is named, and tests that need it skip.
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
# The pages of reports are looked at in a browser. Only a test needs it.
need chromium chromium fonts-dejavu-core || echo "the test that uses it will be skipped" >&2

if [ $complete = no ]; then
    echo "some of what guests need is missing: the tests that use it will be skipped" >&2
fi
