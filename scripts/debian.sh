# Sourced: what the other scripts need of Debian's package tools.

# Whether packages can be installed here.
can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
        install --no-install-recommends "$@" >/dev/null
}

# Install packages; the package lists are refreshed only if they turn out to be missing or stale.
install_packages() {
    echo "installing $*" >&2
    apt_install "$@" 2>/dev/null || { apt-get -qq update && apt_install "$@"; }
}

# Install packages $2... unless command $1 is there; without root say what is missing and return 1.
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
