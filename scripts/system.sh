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
need fio fio || complete=no
need mkfs.ext4 e2fsprogs || complete=no
# Only the tests of copies that share blocks need these.
need mkfs.xfs xfsprogs && need mkfs.btrfs btrfs-progs || echo "tests of XFS and Btrfs will be skipped" >&2
# Only the tests of keys that are wrapped with age need this.
need age age || echo "the tests against another implementation of age will be skipped" >&2
# Only the test of a seed needs this.
need genisoimage genisoimage || echo "the test of a seed of cloud-init will be skipped" >&2

for fetched in qemu-11/bin/qemu-system-x86_64 qemu-10/bin/qemu-system-x86_64 guest/vmlinuz debian/identity \
    ovmf/usr/share/OVMF swtpm/bin/swtpm prometheus/usr/bin/prometheus; do
    [ -e $cache/$fetched ] || { scripts/fetch.sh $cache || complete=no; break; }
done
# Only the tests of domains need libvirt. These packages start no service.
need libvirtd libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients ||
    echo "the tests of libvirt will be skipped" >&2
# The test of report pages needs a browser; no other test does.
need chromium chromium fonts-dejavu-core || echo "the test of report pages will be skipped" >&2

if [ $complete = no ]; then
    echo "programs for guests are missing: the tests that need them will be skipped" >&2
fi
