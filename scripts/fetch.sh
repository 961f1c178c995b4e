#!/bin/sh
# Fetch files from Debian into the cache directory $1, without root and without installing packages:
#   guest/vmlinuz, guest/modules/    a kernel for guests and its virtio modules
#   prometheus/usr/bin/prometheus    Prometheus (its package would start a service)
#   qemu-10/bin/qemu-system-x86_64   QEMU 10, from the backports of this Debian release
#   qemu-11/bin/qemu-system-x86_64   QEMU 11, from a newer release, with its loader and all libraries
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
[ -f "$kernel" ] && [ -x "$backport" ] && [ -x "$prometheus" ] || {
    prepare /var/lib/dpkg/status "$release" "$release-backports"
    [ -f "$kernel" ] || { echo "fetching a guest kernel" >&2; fetch_kernel; }
    [ -x "$backport" ] || { echo "fetching QEMU from $release-backports" >&2; fetch_qemu; }
    [ -x "$prometheus" ] || { echo "fetching Prometheus" >&2; fetch_prometheus; }
}
[ -x "$newest" ] || {
    echo "fetching QEMU from $newer" >&2
    : >"$work/installed"
    prepare "$work/installed" "$newer"
    fetch_newer_qemu
}
