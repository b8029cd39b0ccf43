#!/usr/bin/env bash
# Plays procgen games and records them as .npz episodes, for `dreamer4 data convert`.
#
#   launch/record_procgen.sh coinrun recordings/coinrun --episodes 1000 --workers 8
#   dreamer4 data convert recordings/coinrun data/coinrun
#
# procgen wants NumPy below 2, and its wheels Python 3.11: it gets an environment of its own, made when it is first
# needed in build/procgen (PROCGEN_VENV=directory, PYTHON=python3.11). All words are those of record_procgen.py.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
venv=${PROCGEN_VENV:-$root/build/procgen}
if [ ! -e "$venv/.ready" ]; then
  "${PYTHON:-python3.11}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet 'procgen2==0.10.7' 'numpy<2' 'rich>=13.7'
  touch "$venv/.ready"
fi
exec "$venv/bin/python" "$root/launch/record_procgen.py" "$@"
