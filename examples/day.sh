#!/bin/sh
# An operator's day: a guest is started, saved, paused, migrated to another QEMU, restored and shut down.
#
#     examples/day.sh qemu-system-x86_64 -accel kvm -m 1G ...
#
# Two run directories represent two hosts. The script neither copies nor saves disks, so give the guest no disk. For a
# guest with disks, see --disks and --copy-disks in docs/disks.md. Requires `pageferry` in PATH.
set -eu

folder=$(mktemp -d)
other() { # run a command on the other host
    PAGEFERRY_RUN_DIR="$folder/other" "$@"
}
trap 'pageferry stop web 2>/dev/null || true; other pageferry stop web 2>/dev/null || true; rm -rf "$folder"' EXIT

# Morning: start a guest, and see what it prints.
pageferry run web --detach -- "$@"
pageferry logs web
pageferry monitor web info status

# Save it before a change, and pause it during the change.
pageferry checkpoint web "$folder/morning.img"
pageferry pause web
pageferry resume web

# Noon: move it to the other host.
other pageferry receive web --detach --listen "unix:$folder/web.receive" -- "$@" &
receiver=$!
until [ -S "$folder/web.receive" ]; do
    kill -0 $receiver # ends this script if the receiver has failed
    sleep 0.1
done
pageferry migrate web "unix:$folder/web.receive"
wait $receiver
other pageferry list

# Afternoon: the change was wrong. End the guest, and return to the state of the morning, on the first host.
other pageferry shutdown web --timeout "${SHUTDOWN_TIMEOUT:-60s}" --force
pageferry restore web "$folder/morning.img" --detach -- "$@"
pageferry list

# Evening.
pageferry shutdown web --timeout "${SHUTDOWN_TIMEOUT:-60s}" --force
pageferry list --all
