#!/usr/bin/env bash
# Runs what notebooks/grow.ipynb does on a TPU VM that is asked for: SmolLM2 is converted, grown, healed, looked at, and
# asked for text before and after. Brings the results back, and deletes the VM at the end and after any failure.
set -euo pipefail
FROM=$PWD
cd "$(dirname "$0")/../.."
WORKDIR_HELP="a folder on this machine, for the results; demo if not given"
MORE_HELP="  --runtime VER    software version of the host; by --type if not given
  --source SRC     model on the hub that is grown; smollm2 if not given
  --m N            layers that each copy leaves out; 6 if not given
  --prompt TEXT    what the models go on from
--type is v5litepod-1 if not given, and has one host. The name must be that of no TPU that exists, since it is deleted
at the end. A --spot machine that is taken away ends the demo."
VALUE_FLAGS="runtime source m prompt"
DEFAULT_CONFIG=configs/dus_48l.py:smollm2 DEFAULT_NAME=solar-jax-demo EXTRAS=tpu,gcs,demo
RUNTIME='' SOURCE=smollm2 M=6 PROMPT='The most important thing about a good name for a function is'
source scripts/launch/common.sh
parse --type v5litepod-1 --workdir demo "$@"
[[ "$WORKDIR" != *://* ]] || fail "--workdir $WORKDIR: must be a folder on this machine."
[[ "$WORKDIR" == /* ]] || WORKDIR=$FROM/$WORKDIR
[ ! -e "$WORKDIR" ] || fail "--workdir $WORKDIR: is there already; give a new folder."
source scripts/launch/vm.sh
if [ -z "$DRY_RUN" ]; then
  [ -z "$(state)" ] || fail "$NAME exists, and would be deleted at the end; give another --name."
fi

# The VM costs money for as long as it exists, so it goes whatever happens.
give_back() {
  local status=$?
  trap - EXIT
  delete || echo "error: $NAME was not deleted; if it exists it still costs money: delete it by the command above." >&2
  exit "$status"
}
trap give_back EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

step() { on_all "set -eo pipefail; cd ~/solar_jax; . .venv/bin/activate; mkdir -p runs; $*"; }
say_on() { step "python -m solar_jax.generate --model $1 --prompt $(quoted "$PROMPT") --max_new_tokens 48 | tee $2"; }

obtain
for try in 1 2 3; do  # a new VM does not take connections at once
  install && break
  [ "$try" -lt 3 ] || fail "$NAME takes no connections, or cannot install the package."
  sleep 30
done
step "python -m solar_jax.convert --source $(quoted "$SOURCE") --out runs/base --to hf"
step "python -m solar_jax.upscale --source runs/base --operator dus --m $(quoted "$M") --out runs/grown"
say_on runs/grown runs/before.txt
step "python -m solar_jax.train --config $(quoted "$CONFIG") --config.source=runs/base --config.growth.m=$(quoted "$M")" \
  "--workdir runs/healed --config.train.control=False $(quoted "${TRAIN_FLAGS[@]}")"
say_on runs/healed runs/after.txt
step "python -m solar_jax.seam --model runs/grown --model runs/healed --ablate new --out runs/seam"
step "tar --exclude=checkpoints -czf results.tar.gz runs"
run mkdir -p "$WORKDIR"
run gcloud compute tpus tpu-vm scp "$NAME:solar_jax/results.tar.gz" "$WORKDIR/" "${WHERE[@]}"
run tar -xzf "$WORKDIR/results.tar.gz" -C "$WORKDIR" --strip-components 1
echo "$WORKDIR: healed/hf is the model, healed/loss.png how it healed, seam/report.md a look at the seam"
