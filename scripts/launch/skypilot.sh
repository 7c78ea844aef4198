#!/usr/bin/env bash
# Trains through SkyPilot as a managed job (skypilot.yaml): it finds the slice, runs the same command on every host, and
# when the slice is taken away finds another, where the run goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORKDIR_HELP="folder of the run, which every host sees: gs://BUCKET/PATH"
MORE_HELP=""
VALUE_FLAGS=""
source scripts/launch/common.sh
parse "$@"
[[ "$WORKDIR" == gs://*/?* ]] || fail "--workdir $WORKDIR: must be gs://BUCKET/PATH, since every new slice has to see it."

run env GOOGLE_CLOUD_PROJECT="$PROJECT" sky jobs launch scripts/launch/skypilot.yaml --yes --name "$NAME" \
  --infra "gcp/${ZONE%-*}/$ZONE" --gpus "tpu-$TYPE" ${SPOT:+--use-spot} \
  --env COMMAND="$(train_command)"
