#!/usr/bin/env bash
# Makes environments for detector emulators of other projects, each with what it wants, and
# prints the variables by which the interop tests find them:
#
#     eval "$(tests/emulators_env.sh FOLDER)"
#     python -m pytest -m interop
#
# They cannot share the project's own environment: tickit needs cbor2 < 6.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
mkdir -p "$1"
folder=$(cd "$1" && pwd)

make_env() {
  test -x "$folder/$1/bin/python" || "$python" -m venv "$folder/$1"
  "$folder/$1/bin/python" -m pip install -q --disable-pip-version-check "${@:2}" >&2
}

make_env tickit "tickit-devices==0.4.1" "cbor2<6"
echo "export TRIAGE_TICKIT='$folder/tickit/bin/tickit'"
make_env eigersim "eiger-simulator==0.5.1"
echo "export TRIAGE_EIGER_SIMULATOR='$folder/eigersim/bin/eiger-simulator'"
