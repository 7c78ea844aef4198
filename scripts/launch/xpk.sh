#!/usr/bin/env bash
# Trains on GKE through XPK: builds an image of this commit, pushes it, and creates a workload, a JobSet whose pods run
# the same command. The JobSet starts them again when a machine is lost, and the run goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
WORKDIR_HELP="folder of the run, which every host sees: gs://BUCKET/PATH, or a path on storage that is attached to the cluster
                   (xpk storage attach)"
MORE_HELP="  --cluster C      GKE cluster that XPK has set up
  --image IMAGE    name to push the image under, in a registry that the cluster may read
  --slices N       slices that train together; 1 if not given
  --restarts N     how often the JobSet starts the run again; 20 if not given"
VALUE_FLAGS="cluster image slices restarts"
CLUSTER='' IMAGE='' SLICES=1 RESTARTS=20
source scripts/launch/common.sh
parse "$@"
[ -n "$CLUSTER" ] || fail "--cluster is missing; --help lists all flags."
[ -n "$IMAGE" ] || fail "--image is missing; --help lists all flags."
[[ "$WORKDIR" == /* || "$WORKDIR" == gs://* ]] ||
  fail "--workdir $WORKDIR: must be gs://BUCKET/PATH or a path in the pods, of storage attached with xpk storage."
check_bucket

# From the commit and not from the folder, so that the image holds what is recorded and nothing else.
ARCHIVE=/tmp/solar_jax.tar.gz
run git archive --format=tar.gz --output "$ARCHIVE" HEAD
if [ -n "$DRY_RUN" ]; then
  echo "+ docker build --file scripts/launch/Dockerfile --tag $(quoted "$IMAGE") - < $ARCHIVE"
else
  docker build --file scripts/launch/Dockerfile --tag "$IMAGE" - < "$ARCHIVE"
fi
run docker push "$IMAGE"
# When one host is lost the others fail too, by themselves, so a failure of the command has to count as a restart.
run xpk workload create --workload "$NAME" --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
  --tpu-type "$TYPE" --num-slices "$SLICES" --docker-image "$IMAGE" ${SPOT:+--spot} \
  --max-restarts "$RESTARTS" --restart-on-user-code-failure \
  --command "$(train_command)"
