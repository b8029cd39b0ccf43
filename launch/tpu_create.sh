#!/usr/bin/env bash
# The first of three commands for those who want no tool: asks for a TPU and waits until it is there.
#
#   NAME=mine ZONE=us-central1-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite launch/tpu_create.sh --spot
#
# Further words go to gcloud. Runtimes: v2-alpha-tpuv6e (v6e), v2-alpha-tpuv5 (v5p), tpu-ubuntu2204-base (v4).
set -euo pipefail

tpu=(gcloud compute tpus queued-resources)
"${tpu[@]}" create "${NAME:?}" --node-id="$NAME" --zone="${ZONE:?}" \
  --accelerator-type="${TYPE:?}" --runtime-version="${RUNTIME:?}" "$@"
while state=$("${tpu[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)'); do
  echo "$NAME: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) exit 1 ;;
  esac
  sleep "${POLL:-30}"
done
exit 1
