#!/usr/bin/env bash
# The second of three commands: installs this checkout on every host of the TPU and runs an experiment on all of them.
#
#   NAME=mine ZONE=us-central1-a launch/tpu_run.sh quickstart --run gs://my-bucket/runs/mine --resume
#
# The words are those of `dreamer4 run`. Hosts share no disk, so the run directory is in a bucket. The run ends with the
# connection; `dreamer4 launch --backend tpu` keeps it going, and starts it again when the TPU is taken away.
set -euo pipefail

cd "$(dirname "$0")/.."
tpu=(gcloud compute tpus queued-resources)
all=(--zone="${ZONE:?}" --worker=all --node=all)

mkdir -p build/launch
tar -czf build/launch/code.tar.gz --exclude=__pycache__ --exclude=experiments/results \
  pyproject.toml constraints.txt LICENSE README.md dreamer4_jax experiments launch
"${tpu[@]}" ssh "${NAME:?}" "${all[@]}" --batch-size=1 --quiet --command=true # one worker after another, for the ssh keys
"${tpu[@]}" scp build/launch/code.tar.gz "$NAME:dreamer4.tar.gz" "${all[@]}"
"${tpu[@]}" ssh "$NAME" "${all[@]}" --command="set -e
mkdir -p ~/dreamer4
cd ~/dreamer4
tar -xzf ~/dreamer4.tar.gz
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'"
"${tpu[@]}" ssh "$NAME" "${all[@]}" --batch-size=all --ssh-flag='-o ServerAliveInterval=30' \
  --command="cd ~/dreamer4 && .venv/bin/dreamer4 run $(printf '%q ' "$@")"
