# What is done with Cloud TPU VMs: asking for them, this commit on every host, giving them back. Sourced after parse.

if [ -z "$RUNTIME" ]; then
  case "$TYPE" in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) fail "--type $TYPE: its software version is not known here; give --runtime." ;;
  esac
fi
[ -n "$DRY_RUN" ] || command -v gcloud > /dev/null || fail "gcloud is not installed; it asks for the TPU."
WHERE=(--project "$PROJECT" --zone "$ZONE")
ARCHIVE=/tmp/solar_jax.tar.gz
# Python comes with uv, as the hosts' own is older than this package wants.
INSTALL="python3 -m pip install --quiet uv; [ -d .venv ] || python3 -m uv venv --quiet --python 3.12; "
INSTALL+="python3 -m uv pip install --quiet '.[${EXTRAS:-tpu,gcs}]'"

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
