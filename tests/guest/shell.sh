#!/bin/busybox sh
# Init of the shell guest: loads the kernel modules of the initrd, and executes commands from the serial line.
#
# Each command is one line, `NUMBER COMMAND`. The reply is `REPLY NUMBER OUTPUT`, in one line.

busybox mkdir -p /sys /run/bin /mnt
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox --install -s /run/bin
export PATH=/run/bin
for module in /modules/*; do insmod "$module" 2>/dev/null; done

obey() {
    stty raw -echo </dev/console
    echo READY
    while read -r number command; do
        echo "REPLY $number $(eval "$command" 2>&1 | tr '\n\0' '  ')"
    done
}
obey </dev/console >/dev/console
