# Functions for Debian's package tools; other scripts source this file.

# Return 0 if packages can be installed: as root, with apt-get.
can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "$@" >/dev/null
}

# Install packages; refresh the package lists only if that fails.
install_packages() {
    echo "installing $*" >&2
    apt_install "$@" 2>/dev/null || { apt-get -qq update && apt_install "$@"; }
}

# Install packages $2... unless command $1 exists. Without root, report what is missing and return 1.
need() {
    command -v "$1" >/dev/null && return
    missing=$1
    shift
    if can_install; then
        install_packages "$@"
    else
        echo "missing: $missing (Debian: apt-get install $*)" >&2
        return 1
    fi
}
