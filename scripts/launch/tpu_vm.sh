#!/usr/bin/env bash
# Trains on a TPU slice of Cloud TPU VMs: asks for it, installs this commit on every host, and starts the same command
# on all of them. When the slice is taken away it asks for another and the run goes on. Keep it running (tmux).
set -euo pipefail
cd "$(dirname "$0")/../.."
WORKDIR_HELP="folder of the run, which every host sees: gs://BUCKET/PATH, or a path on a file share"
MORE_HELP="  --runtime VER    software version of the hosts; by --type if not given
  --attempts N     how often a run that fails on healthy machines is started; 3 if not given
  --keep 1         keep the slice after the run"
VALUE_FLAGS="runtime attempts keep"
RUNTIME='' ATTEMPTS=3 KEEP=''
source scripts/launch/common.sh
parse "$@"
source scripts/launch/vm.sh

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
