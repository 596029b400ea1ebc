#!/bin/sh
# Prepares this folder: Mosquitto from the system's packages, Python packages into .venv (and .venv-tflite) here.
# Asks nothing. A second run is instant until a lock file changes. `setup.sh bench` adds what the C yardstick needs.
# PYTHON=/path/to/python chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/local/sbin:/usr/sbin:/opt/homebrew/bin:/opt/homebrew/sbin"
system=$(uname -s)
updated=no

say() { printf '%s\n' "setup: $*"; }
fail() { printf '%s\n' "setup: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else fail "this needs root, and there is no sudo; run as root: $*"
    fi
}

install_packages() { # install_packages WHY PACKAGE...
    why=$1
    shift
    if have brew; then
        say "installing $* with Homebrew: $why"
        brew install --quiet "$@"
    elif have apt-get; then
        say "installing $* with apt-get: $why"
        if [ "$updated" = no ]; then as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update; updated=yes; fi
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" >/dev/null
    else
        fail "please install $* with this system's package manager ($why), then run this again"
    fi
}

works() { # a shim of pyenv exists for versions that are not selected, and then fails
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() { # 3.11 first: the lighter runtime of the agent exists for no later one
    for candidate in ${PYTHON:-} python3.11 "$HOME"/.pyenv/versions/3.11.*/bin/python python3.12 python3.13 python3 \
        "$HOME"/.pyenv/versions/3.1[23].*/bin/python /usr/bin/python3; do
        if works "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

packages_for_python() {
    if have brew; then echo python@3.11; else echo python3 python3-venv; fi
}

stamp_of() { # stamp_of LOCK: changes with the packages, the interpreter and the place
    { cat "$1" pyproject.toml; echo "$python $PWD"; } | cksum
}

make_environment() { # make_environment FOLDER LOCK WHAT
    if [ -f "$1/.stamp" ] && [ "$(cat "$1/.stamp")" = "$(stamp_of "$2")" ] && "$1/bin/python" -c '' 2>/dev/null; then
        return
    fi
    say "installing $3 into $1 (from $2)"
    if ! works "$1/bin/python" || ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$1"
        "$python" -m venv "$1"
    fi
    rm -f "$1/.stamp"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$2"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    stamp_of "$2" >"$1/.stamp"
}

if ! have mosquitto; then
    install_packages "the MQTT broker; demo and tests run a private one" mosquitto
    if [ "$system" = Linux ]; then
        say "note: Debian and its kin also start Mosquitto as a service for this machine alone; nothing here uses that one"
    fi
fi

python=$(find_python)
if [ -z "$python" ]; then
    # shellcheck disable=SC2046  # several words are meant
    install_packages "a Python from 3.11 to 3.13" $(packages_for_python)
    python=$(find_python)
    [ -n "$python" ] || fail "no Python from 3.11 to 3.13 here; install one and name it: PYTHON=/path/to/python make setup"
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    install_packages "virtual environments for $python" "python$version-venv"
fi

make_environment .venv requirements/dev.lock "both sides, TensorFlow, test and lint tools, about 2.5 GB,"
if [ "$system" = Linux ] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    make_environment .venv-tflite requirements/dev-tflite.lock "the agent alone with tflite-runtime, its lighter runtime,"
fi

if [ "${1:-}" = bench ]; then
    if ! have cc; then
        [ "$system" = Linux ] || fail "the benchmark's yardstick needs a C compiler: xcode-select --install"
        install_packages "a C compiler, for the yardstick of the benchmark" gcc libc6-dev
    fi
    if ! printf '#include <mosquitto.h>\n' | cc -E -I/opt/homebrew/include -x c - >/dev/null 2>&1; then
        [ "$system" = Linux ] || fail "mosquitto.h is missing, which comes with: brew reinstall mosquitto"
        install_packages "the C library of the yardstick" libmosquitto-dev
    fi
fi
