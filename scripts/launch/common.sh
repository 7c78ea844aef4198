# What the launchers share: their arguments, the one training command, and the dry run. Sourced, not run.

usage() {
  cat <<TEXT
usage: $(basename "$0") --project P --zone Z --type SLICE --workdir DIR [options] [-- train flags]

  --project P      Google Cloud project
  --zone Z         zone, e.g. us-east5-a
  --type SLICE     slice, e.g. v5p-128, v6e-64, v5litepod-16
  --workdir DIR    $WORKDIR_HELP
  --config FILE    config file; ${DEFAULT_CONFIG:=configs/dus_48l.py} if not given
  --name NAME      of what is created; ${DEFAULT_NAME:=solar-jax} if not given
  --spot           cheaper machines, which may be taken away; the run goes on on new ones
  --dry_run        print every command and run none
$MORE_HELP
TEXT
}

fail() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] >= 5)) || fail "bash 5 is needed, found $BASH_VERSION."

# Its arguments as a shell reads them back, in quotes only where it has to be.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="${word@Q}"
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# Prints a command so that it can be pasted; runs it unless this is a dry run.
run() {
  echo "+ $(quoted "$@")"
  [ -n "$DRY_RUN" ] || "$@"
}

# Flags of one launcher alone: each name in VALUE_FLAGS sets the variable of its name in capitals.
parse() {
  PROJECT='' ZONE='' TYPE='' WORKDIR='' SPOT='' DRY_RUN=''
  CONFIG=${DEFAULT_CONFIG:-configs/dus_48l.py} NAME=${DEFAULT_NAME:-solar-jax}
  TRAIN_FLAGS=()
  local name known
  known=" project zone type workdir config name $VALUE_FLAGS "
  while [ $# -gt 0 ]; do
    case "$1" in
      --) shift; TRAIN_FLAGS=("$@"); break ;;
      --help) usage; exit 0 ;;
      --spot) SPOT=1; shift ;;
      --dry_run) DRY_RUN=1; shift ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --*)
        name="${1#--}"
        [[ "$known" == *" $name "* ]] || fail "unknown flag $1; --help lists them."
        [ $# -gt 1 ] || fail "$1 needs a value."
        printf -v "${name^^}" '%s' "$2"
        shift 2
        ;;
      *) fail "unexpected argument '$1'; flags of the training command follow after --." ;;
    esac
  done
  for name in PROJECT ZONE TYPE WORKDIR; do
    [ -n "${!name}" ] || fail "--${name,,} is missing; --help lists all flags."
  done
}

# The command that trains, the same everywhere; again, it goes on from the last checkpoint. Checkpoints pass through
# memory that is new each time, which the C library is told to take in large pages. A machine that was lost may still
# own the folder in the bucket; the next one waits until it has been silent for a minute.
train_command() {
  echo "env GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m solar_jax.train" \
    "$(quoted --take_over --config "$CONFIG" --workdir "$WORKDIR" "${TRAIN_FLAGS[@]}")"
}

# Stops where $WORKDIR names a bucket without a folder in it.
check_bucket() {
  [[ "$WORKDIR" != gs://* || "$WORKDIR" == gs://*/?* ]] || fail "--workdir $WORKDIR: must name a folder in the bucket."
}
