#!/bin/busybox sh
# Init of the Debian guest: runs SQLite, Redis and fio on the file system /data, and obeys commands on the serial line.
#
# Each command is one line, `NUMBER NAME`. The reply is `REPLY NUMBER TEXT`; the text begins with `bad` if a check has
# failed. Commands:
#   load       start the load
#   check      check the results of all programs; print the amounts of work since the start
#   zoo        start to use the devices of the zoo
#   zoo_check  check what the devices hold since `zoo` or the previous `zoo_check`, and change it
#   write FILE write 20 MB/s to a file or device
#   end        end the load, and unmount the file systems on disks
#
# The first part runs in the initramfs, the second one in the root file system.

start_root() {
    busybox mount -t devtmpfs dev /dev
    busybox mount -t proc proc /proc
    for module in /modules/*; do busybox insmod $module 2>/dev/null; done
    until [ -b /dev/vda ]; do busybox sleep 0.05; done
    busybox mount -t ext4 -o ro /dev/vda /root
    busybox mount -t tmpfs run /root/run
    busybox cp /init /root/run/init
    busybox mount --move /dev /root/dev
    busybox mount --move /proc /root/proc
    busybox mount -t sysfs sys /root/sys
    exec busybox chroot /root /run/init
}

# The disk with the file system $1: the label is 120 bytes into the superblock, which is 1024 bytes into the disk.
disk() {
    until for found in /dev/vd? /dev/sd?; do
        [ "$(dd if=$found bs=1 skip=1144 count=${#1} 2>/dev/null)" = "$1" ] && echo $found && return
    done; do sleep 0.1; done
}

bad() { echo "$*" >>/run/bad; }

# Money is moved between 1000 accounts. Their total never changes. SQLite prints the number of each transfer when it
# has been committed.
sqlite_load() {
    sqlite3 /data/bank "PRAGMA journal_mode=WAL; CREATE TABLE transfer (id INTEGER PRIMARY KEY, text);
        CREATE TABLE account (id INTEGER PRIMARY KEY, money INTEGER);
        WITH n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 999) INSERT INTO account SELECT i, 100 FROM n;"
    while [ -e /run/load ]; do
        for _ in 1 2 3 4; do
            echo "BEGIN; UPDATE account SET money = money - 1 WHERE id = (SELECT abs(random() % 1000));
                UPDATE account SET money = money + 1 WHERE id = (SELECT abs(random() % 1000));
                INSERT INTO transfer (text) VALUES (hex(randomblob(400))); COMMIT; SELECT max(id) FROM transfer;"
        done
        sleep 0.5
    done | sqlite3 -cmd '.timeout 60000' /data/bank >/run/committed
}

sqlite_check() {
    committed=$(tail -n 1 /run/committed)
    set -- $(sqlite3 -separator ' ' -cmd '.timeout 60000' /data/bank "PRAGMA integrity_check;
        SELECT sum(money) FROM account; SELECT max(id), sum(length(text) = 800) FROM transfer;")
    [ "$1 $2" = "ok 100000" ] && [ "$3" = "$4" ] && [ "$3" -ge "${committed:-0}" ] || bad "sqlite: $* ($committed)"
    echo "transfers=$3"
}

# Each key holds a hash of its number.
redis_load() {
    mkdir -p /data/redis
    redis-server --dir /data/redis --appendonly yes --save '' --unixsocket /run/redis.sock --daemonize yes >/dev/null
    until [ -S /run/redis.sock ]; do sleep 0.1; done
    while [ -e /run/load ]; do
        echo "EVAL \"local n = redis.call('INCRBY', 'n', 50)
            for i = n - 49, n do redis.call('SET', i, redis.sha1hex(i)) end\" 0" | tr '\n' ' '
        echo
        sleep 0.5
    done | redis-cli -s /run/redis.sock >/run/redis
}

redis_check() {
    set -- $(redis-cli -s /run/redis.sock EVAL "local n = tonumber(redis.call('GET', 'n')) local bad = 0
        for i = 1, n do if redis.call('GET', i) ~= redis.sha1hex(i) then bad = bad + 1 end end
        return {n, bad, redis.call('DBSIZE') - n}" 0)
    [ "$2 $3" = "0 1" ] || bad "redis: $*"
    echo "keys=$1"
}

# fio exits at the first block that it reads back with other contents.
fio_load() {
    fio --name=verify --filename=/data/verify --size=2m --bs=16k --rw=randwrite --direct=1 --ioengine=libaio \
        --iodepth=8 --rate=200k --verify=crc32c --verify_backlog=32 --verify_fatal=1 --thread --time_based \
        --runtime=1000000 >/run/fio 2>&1 &
    echo $! >/run/fio-pid
    wait $!
    [ ! -e /run/load ] || bad "fio: $(tail -n 3 /run/fio)"
}

fio_check() { echo "verified=$(sed -n 's/^read_bytes: //p' "/proc/$(cat /run/fio-pid)/io")"; }

load() {
    mount -t ext4 "$(disk data)" /data
    touch /run/load
    for each in sqlite_load redis_load fio_load; do
        $each >/dev/null 2>&1 &
        LOAD="$LOAD $!"
    done
    until [ -s /run/committed ] && [ -s /run/redis ]; do sleep 0.1; done
}

check() {
    echo "$(sqlite_check) $(redis_check) $(fio_check) $(dmesg | grep -c 'I/O error\|EXT4-fs error\|BUG:\|Oops') errors"
}

write() {
    fio --name=write --filename=$1 --size=64m --bs=256k --rw=write --direct=1 --ioengine=libaio --iodepth=4 --thread \
        --rate=20m --time_based --runtime=1000000 >/dev/null 2>&1 &
    sleep 5
}

uuid() { cat /proc/sys/kernel/random/uuid; }
digest() { sha256sum | cut -c -64; }
same() { [ "$2" = "$3" ] || bad "$1 holds '$2' instead of '$3'"; }

# A variable of the firmware is stored in flash. The first four bytes of its file are attributes.
VARIABLE=/sys/firmware/efi/efivars/Zoo-7b4ed6c1-64f0-4b0e-9c43-3f7b9d1c8a52
efi_write() {
    [ ! -e $VARIABLE ] || return # the kernel protects existing variables
    uuid >/run/variable
    printf '\7\0\0\0%s' "$(cat /run/variable)" >$VARIABLE
}
efi_check() { same "the UEFI variable" "$(tail -c +5 $VARIABLE)" "$(cat /run/variable)"; }

# PCR 16 is in the volatile state of the TPM, the index 0x1500016 in its permanent state. tpm2-tools would need
# seconds of CPU time per call under TCG. The commands are those of part 3 of the TPM 2.0 specification, with an empty password.
tpm() { printf %s "$*" | tr -d ' ' | xxd -r -p >&6 && dd bs=4096 count=1 <&6 2>/dev/null | xxd -p | tr -d '\n'; }
PASSWORD="00000009 40000009 0000 01 0000"
nv_define() { tpm 8002 0000002d 0000012a 40000001 $PASSWORD 0000 000e 01500016 000b 00020002 0000 0024; }
nv_write() { tpm 8002 00000047 00000137 40000001 01500016 $PASSWORD 0024 "$(xxd -p </run/nv | tr -d '\n')" 0000; }
nv_read() { tpm 8002 00000023 0000014e 40000001 01500016 $PASSWORD 0024 0000 | cut -c 33-104 | xxd -r -p; }
extend() { tpm 8002 00000041 00000182 00000010 $PASSWORD 00000001 000b "$1"; }
pcr() { tr -d ' \n' </sys/class/tpm/tpm0/pcr-sha256/16 | tr A-F a-f; }
tpm_write() {
    before=$(pcr)
    new=$(uuid | digest)
    uuid | tr -d '\n' >/run/nv
    { extend "$new"; nv_write; } 6<>/dev/tpm0 >/run/tpm
    printf '%s%s' "$before" "$new" | xxd -r -p | digest >/run/pcr
}
tpm_check() {
    same "PCR 16" "$(pcr)" "$(cat /run/pcr)"
    same "the index of the TPM" "$(nv_read 6<>/dev/tpm0)" "$(cat /run/nv)"
}

usb_write() {
    head -c 200k /dev/urandom >/usb/file
    digest </usb/file >/run/usb
}
usb_check() {
    umount /usb && mount -t ext4 "$(disk usb)" /usb || bad "cannot mount the USB disk"
    same "the USB disk" "$(digest </usb/file)" "$(cat /run/usb)"
}

screen_write() { head -c 200k /dev/urandom >/dev/fb0; head -c 200k /dev/fb0 | digest >/run/screen; }
screen_check() { same "the screen" "$(head -c 200k /dev/fb0 | digest)" "$(cat /run/screen)"; }

net_write() { :; }
net_check() {
    tftp -g -r file -l /tmp/file 10.0.2.2 || bad "tftp failed"
    [ -s /run/net ] || digest </tmp/file >/run/net
    same "the file from the network" "$(digest </tmp/file)" "$(cat /run/net)"
    [ -n "$(head -c 16 /dev/hwrng)" ] || bad "virtio-rng returns nothing"
}

# The balloon reports freed memory to QEMU, which discards it.
churn() {
    while [ -e /run/load ]; do
        word=$(uuid)
        yes "$word" | head -c 3m >/tmp/churn
        yes "$word" | head -c 3m | cmp - /tmp/churn || bad "memory that was free has other contents"
        rm /tmp/churn
        echo >>/run/churned
        sleep 5
    done
}

# Send each line of the host back.
echo_lines() {
    while :; do
        while read -r line <&5; do echo "$line" >&5; done 5<>"$(echo /dev/vport*)"
        sleep 0.5
    done
}

zoo() {
    mount -t efivarfs efivarfs /sys/firmware/efi/efivars
    mount -t ext4 "$(disk usb)" /usb
    echo 0 >/sys/class/graphics/fbcon/cursor_blink
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    nv_define 6<>/dev/tpm0 >/run/tpm
    for each in churn echo_lines; do $each >/dev/null 2>&1 & done
    for input in /sys/class/input/event*; do
        grep -q Tablet $input/device/name && cat /dev/input/${input##*/} >/run/events &
    done
    for each in efi tpm usb screen net; do ${each}_write; done
    net_check
}

zoo_check() {
    for each in efi tpm usb screen net; do ${each}_check && ${each}_write; done
    echo "events=$(wc -c </run/events) churned=$(wc -l </run/churned)"
}

end() {
    rm -f /run/load
    kill "$(cat /run/fio-pid)"
    redis-cli -s /run/redis.sock shutdown
    wait $LOAD
    umount /data
    [ ! -e /run/variable ] || umount /usb
}

obey() {
    stty raw -echo </dev/console
    echo READY
    while read -r number name; do
        $name >/run/text 2>&1
        text=$(tr '\n' ' ' </run/text)
        [ -e /run/bad ] && text="bad $(tr '\n' ' ' </run/bad) $text"
        echo "REPLY $number $text"
    done
}

[ -d /modules ] && start_root
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mkdir /run/bin
busybox --install -s /run/bin
export PATH=$PATH:/run/bin
mount -t tmpfs tmp /tmp
ip link set lo up
dmesg -n 1
obey </dev/console >/dev/console
