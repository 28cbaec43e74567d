#!/usr/bin/env bash
# Makes the environment in which `triage bench peers` runs the peakfinder8 of OM (ondamonitor).
#
#     benchmarks/peers_env.sh FOLDER
#     triage bench peers --peer-python FOLDER/bin/python
#
# OM is under the GPL, so it stays out of this project's own environment: it is run as a program
# of its own and told of frames over a pipe.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
test -x "$1/bin/python" || "$python" -m venv "$1"
"$1/bin/python" -m pip install -q ondamonitor numpy
echo "$1/bin/python"
