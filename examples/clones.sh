#!/bin/sh
# Two clones of a running guest from one image. They run at once, and read the image when they need it; it is opened
# for reading only, and stands once in the page cache.
#
#     examples/clones.sh qemu-system-x86_64 -accel kvm -m 1G ...
#
# Disks are not copied: give the guest none, or one with -snapshot. Needs `pageferry` in PATH.
set -eu

folder=$(mktemp -d)
trap 'for guest in base clone1 clone2; do pageferry stop "$guest" || true; done; rm -rf "$folder"' EXIT

pageferry run base --detach -- "$@"
sleep "${BOOT_SECONDS:-10}" # until there is something worth cloning

pageferry checkpoint base "$folder/base.img"
for clone in clone1 clone2; do
    pageferry restore "$clone" "$folder/base.img" --detach -- "$@"
done

pageferry list
pageferry sharing clone1 clone2
