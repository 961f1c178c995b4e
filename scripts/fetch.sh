#!/bin/sh
# Fetch files from Debian into the cache directory $1, without root and without installing packages:
#   guest/vmlinuz, guest/modules/    a kernel for guests and its virtio modules
#   debian/vmlinuz, debian/modules/, debian/identity/, debian/root/
#                                    a kernel with more drivers (vmgenid, for example), its modules in loading order
#                                    (identity/: for fw_cfg and CD-ROM drives), and the unpacked packages of a guest
#                                    with SQLite, Redis and fio
#   ovmf/usr/share/OVMF/             UEFI firmware for guests
#   prometheus/usr/bin/prometheus    Prometheus (its package would start a service)
#   qemu-10/bin/qemu-system-x86_64   QEMU 10, from the backports of this Debian release
#   qemu-11/bin/qemu-system-x86_64   QEMU 11, from a newer release, with its loader and all libraries
#   swtpm/bin/swtpm                  a TPM for guests
# apt-get uses separate sources and lists: those of the machine may be stale, and stay unchanged. Only complete results
# are moved into place.
set -eu

cache=$(mkdir -p "$1" && cd "$1" && pwd)
newer=forky
work=$(mktemp -d "$cache/apt.XXXXXX")
trap 'rm -rf "$work"' EXIT
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] && [ -n "$release" ] && command -v apt-get >/dev/null || {
    echo "missing: a guest kernel, QEMU 10 and QEMU 11 in $1: they are fetched on Debian for amd64 only" >&2
    exit 1
}

# Print the package mirror that this machine uses for its own release.
mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 2>/dev/null |
        awk -v release="$release" '$2 == release && !/security/ { print $1; exit }'
}

# Read the package lists of suites $2...; $1 is a dpkg status file of the installed packages.
prepare() {
    installed=$1
    shift
    uri=$(mirror)
    rm -rf "$work/sources" "$work/lists" "$work/archives"
    mkdir -p "$work/sources" "$work/lists/partial" "$work/archives/partial"
    for suite in "$@"; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] ${uri:-http://deb.debian.org/debian} $suite main"
    done >"$work/sources/debian.list"
    cat >"$work/apt.conf" <<CONF
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$work/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$work/sources";
Dir::State::Lists "$work/lists";
Dir::State::status "$installed";
Dir::Cache::Archives "$work/archives";
Dir::Cache::PkgCache "";
Dir::Cache::SrcPkgCache "";
Acquire::Languages "none";
APT::Sandbox::User "";
APT::Keep-Downloaded-Packages "true";
Debug::NoLocking "true";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
CONF
    private_apt update
}

private_apt() {
    apt-get -qq -c "$work/apt.conf" "$@"
}

unpack() {
    mkdir -p "$1"
    find "$work/archives" -name '*.deb' -exec dpkg -x {} "$1" \; -delete
}

fetch_kernel() {
    image=$(apt-cache -c "$work/apt.conf" depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
    (cd "$work/archives" && private_apt download "$image")
    unpack "$work/kernel"
    mkdir -p "$work/guest/modules"
    mv "$work"/kernel/boot/vmlinuz-* "$work/guest/vmlinuz"
    mv "$work"/kernel/lib/modules/*/kernel/drivers/virtio/*.ko* "$work/guest/modules/"
    rm -rf "$cache/guest"
    mv "$work/guest" "$cache/guest"
}

# Copy a module of the unpacked kernel $2 and its dependencies to the directory $3. Numbers in front of their names give
# the loading order. Modules that are built into the kernel have no file.
copy_module() {
    for module in $1; do
        file=$(find "$2/lib/modules" -name "$module.ko" -o -name "$(echo "$module" | tr _ -).ko" | head -n 1)
        [ -n "$file" ] && ! ls "$3"/*-"$(basename "$file")" >/dev/null 2>&1 || continue
        # Recurse in a subshell, because the recursion assigns the same variables.
        (copy_module "$(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr ',-' ' _')" "$2" "$3")
        cp "$file" "$3/$(ls "$3" | wc -l | awk '{ printf "%02d", $1 }')-$(basename "$file")"
    done
}

# Fetch packages with all of their dependencies, because the guest has no others. Their scripts do not run.
fetch_debian_guest() {
    private_apt -y --download-only --no-install-recommends install \
        busybox-static sqlite3 redis-server redis-tools fio
    unpack "$work/debian/root"
    (
        cd "$work/debian/root"
        rm -rf boot var usr/share usr/lib/python3* usr/lib/x86_64-linux-gnu/perl* usr/lib/udev lib/udev lib/systemd
        mkdir -p data usb dev proc run sys tmp var
        ln -sf busybox bin/sh
        echo 'root:x:0:0:root:/:/bin/sh' >etc/passwd
        echo 'root:x:0:' >etc/group
    )
    image=$(apt-cache -c "$work/apt.conf" depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
    (cd "$work/archives" && private_apt download "$image")
    unpack "$work/linux"
    mkdir -p "$work/debian/modules" "$work/debian/identity"
    mv "$work"/linux/boot/vmlinuz-* "$work/debian/vmlinuz"
    copy_module "virtio_pci virtio_blk virtio_scsi sd_mod virtio_net virtio_console virtio_rng virtio_balloon crc32c_generic ext4 \
        xhci_pci usb_storage usbhid hid_generic evdev bochs tpm_crb tpm_tis efivarfs" "$work/linux" "$work/debian/modules"
    copy_module "qemu_fw_cfg virtio_pci virtio_scsi sr_mod isofs" "$work/linux" "$work/debian/identity"
    rm -rf "$cache/debian"
    mv "$work/debian" "$cache/debian"
}

fetch_swtpm() {
    private_apt -y --download-only --no-install-recommends install swtpm
    unpack "$work/swtpm"
    mkdir -p "$work/swtpm/bin"
    cat >"$work/swtpm/bin/swtpm" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
libraries=$root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="$libraries/swtpm:$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
swtpm=$root/usr/bin/swtpm
[ -x "$swtpm" ] || swtpm=/usr/bin/swtpm
exec "$swtpm" "$@"
WRAPPER
    chmod +x "$work/swtpm/bin/swtpm"
    "$work/swtpm/bin/swtpm" --version >/dev/null
    rm -rf "$cache/swtpm"
    mv "$work/swtpm" "$cache/swtpm"
}

fetch_firmware() {
    (cd "$work/archives" && private_apt download ovmf)
    unpack "$work/ovmf"
    rm -rf "$cache/ovmf"
    mv "$work/ovmf" "$cache/ovmf"
}

# Fetch the packages that an installation would add or upgrade. The wrapper uses installed packages for all others,
# including QEMU itself if the release's own version is the newest.
fetch_qemu() {
    private_apt -y --download-only --no-install-recommends -t "$release-backports" install qemu-system-x86
    unpack "$work/qemu"
    mkdir -p "$work/qemu/bin"
    # The wrapper uses exec, so that the started process is QEMU.
    cat >"$work/qemu/bin/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
libraries=$root/usr/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH="$libraries:$root/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="$libraries/qemu"
qemu=$root/usr/bin/qemu-system-x86_64
[ -x "$qemu" ] || qemu=/usr/bin/qemu-system-x86_64
exec "$qemu" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
WRAPPER
    chmod +x "$work/qemu/bin/qemu-system-x86_64"
    "$work/qemu/bin/qemu-system-x86_64" -version >/dev/null
    rm -rf "$cache/qemu-10"
    mv "$work/qemu" "$cache/qemu-10"
}

# Fetch QEMU with all dependencies (the dpkg status file is empty): its libraries need a newer C library than the
# machine's, which needs its own loader. QEMU_MODULE_DIR locates the modules.
fetch_newer_qemu() {
    private_apt -y --download-only --no-install-recommends install qemu-system-x86
    unpack "$work/newer"
    mkdir -p "$work/newer/bin"
    cat >"$work/newer/bin/qemu-system-x86_64" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
libraries=$root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libraries/qemu"
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/systemd" --argv0 "$0" \
    "$root/usr/bin/qemu-system-x86_64" \
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
WRAPPER
    chmod +x "$work/newer/bin/qemu-system-x86_64"
    "$work/newer/bin/qemu-system-x86_64" -version >/dev/null
    rm -rf "$cache/qemu-11"
    mv "$work/newer" "$cache/qemu-11"
}

fetch_prometheus() {
    (cd "$work/archives" && private_apt download prometheus)
    unpack "$work/prometheus"
    rm -rf "$cache/prometheus"
    mv "$work/prometheus" "$cache/prometheus"
}

kernel=$cache/guest/vmlinuz
backport=$cache/qemu-10/bin/qemu-system-x86_64
newest=$cache/qemu-11/bin/qemu-system-x86_64
prometheus=$cache/prometheus/usr/bin/prometheus
debian=$cache/debian/identity
firmware=$cache/ovmf/usr/share/OVMF
swtpm=$cache/swtpm/bin/swtpm
[ -f "$kernel" ] && [ -x "$backport" ] && [ -x "$prometheus" ] && [ -d "$firmware" ] && [ -x "$swtpm" ] || {
    prepare /var/lib/dpkg/status "$release" "$release-backports"
    [ -f "$kernel" ] || { echo "fetching a guest kernel" >&2; fetch_kernel; }
    [ -x "$backport" ] || { echo "fetching QEMU from $release-backports" >&2; fetch_qemu; }
    [ -x "$prometheus" ] || { echo "fetching Prometheus" >&2; fetch_prometheus; }
    [ -d "$firmware" ] || { echo "fetching UEFI firmware" >&2; fetch_firmware; }
    [ -x "$swtpm" ] || { echo "fetching swtpm" >&2; fetch_swtpm; }
}
[ -d "$debian" ] || {
    echo "fetching a Debian guest" >&2
    : >"$work/installed"
    prepare "$work/installed" "$release"
    fetch_debian_guest
}
[ -x "$newest" ] || {
    echo "fetching QEMU from $newer" >&2
    : >"$work/installed"
    prepare "$work/installed" "$newer"
    fetch_newer_qemu
}
