#!/usr/bin/env bash
# The third of three commands: gives the TPU back. Until then it costs money, whether it computes or not.
#
#   NAME=mine ZONE=us-central1-a launch/tpu_delete.sh
set -euo pipefail

gcloud compute tpus queued-resources delete "${NAME:?}" --zone="${ZONE:?}" --force --quiet "$@"
