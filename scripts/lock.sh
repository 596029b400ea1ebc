#!/bin/sh
# Resolves pyproject.toml for all supported systems and Pythons into requirements/*.lock. Needs the network.
set -eu
cd "$(dirname "$0")/.."

tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
"${PYTHON:-.venv/bin/python}" -m venv "$tool"
"$tool/bin/python" -m pip install --quiet 'uv>=0.8,<1'

lock() { # lock OUTPUT OPTION...; it names no host, so that any mirror of the package index serves
    output=$1
    shift
    "$tool/bin/uv" pip compile --quiet --universal --python-version 3.11 --upgrade \
        --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
        "$@" pyproject.toml --output-file "$output"
    echo "wrote $output"
}

lock requirements/dev.lock --extra edge --extra host --extra test --extra lint
lock requirements/dev-tflite.lock --no-config --extra edge-tflite --extra test
