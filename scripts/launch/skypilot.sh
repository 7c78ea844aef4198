#!/usr/bin/env bash
# Trains through SkyPilot as a managed job (skypilot.yaml): it finds the slice, runs the same command on every host, and
# when the slice is taken away finds another, where the run goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORKDIR_HELP="gs://BUCKET/PATH (mounted; a bucket with hierarchical namespace)"
MORE_HELP=""
VALUE_FLAGS=""
source scripts/launch/common.sh
parse "$@"
[[ "$WORKDIR" == gs://*/?* ]] || fail "--workdir $WORKDIR: must be gs://BUCKET/PATH, since every new slice has to see it."

bucket="${WORKDIR#gs://}"
run env GOOGLE_CLOUD_PROJECT="$PROJECT" sky jobs launch scripts/launch/skypilot.yaml --yes --name "$NAME" \
  --infra "gcp/${ZONE%-*}/$ZONE" --gpus "tpu-$TYPE" ${SPOT:+--use-spot} \
  --env BUCKET="gs://${bucket%%/*}" --env COMMAND="$(train_command "/bucket/$(quoted "${bucket#*/}")")"
