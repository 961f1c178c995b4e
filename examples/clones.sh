#!/bin/sh
# Start two clones of a running guest from one image. They run at once, and load the image on demand. Both open the
# image read-only, so it occupies the page cache only once. Each has separate memory, so that `sharing` can examine it;
# `pageferry clone` starts guests that share the memory of the image.
#
#     examples/clones.sh qemu-system-x86_64 -accel kvm -m 1G ...
#
# The script does not save disks: give the guest no disk, or one with -snapshot. Requires `pageferry` in PATH.
set -eu

folder=$(mktemp -d)
trap 'for guest in base clone1 clone2; do pageferry stop "$guest" || true; done; rm -rf "$folder"' EXIT

pageferry run base --detach -- "$@"
sleep "${BOOT_SECONDS:-10}" # until the guest has booted

pageferry checkpoint base "$folder/base.img"
for clone in clone1 clone2; do
    pageferry restore "$clone" "$folder/base.img" --detach -- "$@"
done

pageferry list
pageferry sharing clone1 clone2
