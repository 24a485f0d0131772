#!/usr/bin/env bash
# Environments of the contestants, each its own: race/setup.sh DIR makes DIR/laconic, DIR/llmcompressor, DIR/gptqmodel,
# DIR/autoround. Ours has what its users install, and none of what its developers do.
# torch comes first, so that a machine without a GPU gets its CPU build; a peer that brings another is set back.
set -euo pipefail
python=${PYTHON:-python3}
make() {
  [ -e "$1/ready" ] && return
  "$python" -m venv "$1"
  "$1/bin/python" -m pip install -q --upgrade pip setuptools wheel
  "$1/bin/python" -m pip install -q torch==2.13.0
  "$1/bin/python" -m pip install -q --no-build-isolation "${@:2}"
  "$1/bin/python" -m pip install -q --force-reinstall --no-deps torch==2.13.0
  touch "$1/ready"
}
mkdir -p "$1"
make "$1/laconic" --editable "$(dirname "$0")/../.."
make "$1/llmcompressor" 'llmcompressor==0.14.*'
make "$1/gptqmodel" 'gptqmodel==7.7.*'
make "$1/autoround" 'auto-round==0.16.*'
