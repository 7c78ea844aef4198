#!/usr/bin/env bash
# Trains on a TPU slice of Cloud TPU VMs: asks for it, installs this commit on every host, and starts the same command
# on all of them. When the slice is taken away it asks for another and the run goes on. Keep it running (tmux).
set -euo pipefail
cd "$(dirname "$0")/../.."
WORKDIR_HELP="gs://BUCKET/PATH, or a path on a file share"
MORE_HELP="  --runtime VER    software version of the hosts; by --type if not given
  --attempts N     how often a run that fails on healthy machines is started; 3 if not given
  --keep 1         keep the slice after the run"
VALUE_FLAGS="runtime attempts keep"
RUNTIME='' ATTEMPTS=3 KEEP=''
source scripts/launch/common.sh
parse "$@"

if [ -z "$RUNTIME" ]; then
  case "$TYPE" in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "--type $TYPE: its software version is not known here; give --runtime." ;;
  esac
fi
WHERE=(--project "$PROJECT" --zone "$ZONE")
ARCHIVE=/tmp/solar_jax.tar.gz
# Python comes with uv, as the hosts' own is older than this package wants.
INSTALL='python3 -m pip install --quiet uv; [ -d .venv ] || python3 -m uv venv --quiet --python 3.12; python3 -m uv pip install --quiet ".[tpu,gcs]"'

on_all() { run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"; }

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" --node-id "$NAME" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet; }

# Returns with the slice active, asking for it anew as often as it takes.
obtain() {
  if [ -n "$DRY_RUN" ]; then
    create
    echo "# until its state is ACTIVE; a slice that is SUSPENDED or FAILED is deleted and asked for again:"
    run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format='value(state.state)'
    return
  fi
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      '') create ;;
      SUSPENDED | FAILED) delete ;;
    esac
    sleep 30
  done
}

install() {
  run git archive --format=tar.gz --output "$ARCHIVE" HEAD &&
    run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME:solar_jax.tar.gz" "${WHERE[@]}" --worker=all &&
    on_all "set -e; mkdir -p solar_jax; tar -xzf solar_jax.tar.gz -C solar_jax; cd solar_jax; $INSTALL"
}

# A process that a lost connection left behind holds the chips, so it goes first.
train() {
  on_all "cd ~/solar_jax; [ ! -f train.pid ] || { kill \$(cat train.pid) 2>/dev/null && sleep 20; }; echo \$\$ > train.pid; . .venv/bin/activate; exec $(train_command)"
}

check_bucket
failed=0
while true; do
  obtain
  if install && train; then
    break
  fi
  sleep 60  # until a slice that was taken away says so
  if [ "$(state)" = ACTIVE ]; then
    failed=$((failed + 1))
    [ "$failed" -lt "$ATTEMPTS" ] || fail "the run failed $failed times on healthy machines; $NAME is kept, to look."
  fi
done
[ -n "$KEEP" ] || delete
