#!/usr/bin/env bash
# Takes a bare Cloud TPU VM, or all workers of a pod, to a working dpojax; safe to repeat.
#
#   ./tpu_setup.sh --name NAME [--zone ZONE] [--project PROJECT] [install | check]
#       from your own machine: copies this checkout to every worker and runs this script there
#   ./tpu_setup.sh [install | check]
#       on a TPU VM: installs this checkout into .venv, then checks the devices and a sum
#       over those of all workers. `check` waits for the other workers, so that on a pod
#       it must run on all of them at once.
#
# GCE_METADATA_HOST is where the metadata server answers, if not at Google's address.
# Runs on macOS too, whose bash is 3.2.
set -euo pipefail

readonly python_versions='>=3.11,<3.13' # those that the tests run on
readonly metadata_host=${GCE_METADATA_HOST:-metadata.google.internal}
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly checkout
name="" where=() stage="" speaker=""

say() { printf '%s%s\n' "$speaker" "$*"; }

fail() {
  printf 'tpu_setup: error: %s%s\n' "$speaker" "$*" >&2
  exit 1
}

main() {
  read_arguments "$@"
  if [ -n "$name" ]; then
    set_up_pod
  else
    set_up_worker
  fi
}

read_arguments() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name | --zone | --project)
        [ -n "${2:-}" ] || fail "$1 needs a value."
        if [ "$1" = --name ]; then name=$2; else where+=("$1=$2"); fi
        shift 2
        ;;
      install | check)
        [ -z "$stage" ] || fail "Give install or check, or neither for both."
        stage=$1
        shift
        ;;
      -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      *) fail "There is no argument '$1'; --help shows those there are." ;;
    esac
  done
  if [ -z "$name" ] && [ ${#where[@]} -gt 0 ]; then
    fail "${where[0]%%=*} says where the TPU of --name is; give --name too."
  fi
}

is_due() { [ -z "$stage" ] || [ "$stage" = "$1" ]; }

# -- From your own machine: every worker, by gcloud -------------------------------------

set_up_pod() {
  command -v gcloud >/dev/null ||
    fail "gcloud is missing; install the Google Cloud SDK, or run this on the TPU VM itself."
  local state
  state=$(tpu_vm describe "$name" --format='value(state)') ||
    fail "gcloud finds no TPU VM '$name'; its own words are above."
  [ "$state" = READY ] ||
    fail "The TPU VM '$name' is ${state:-in no state}; run this again when it is READY."
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  if is_due install; then
    copy_checkout
    # A stage of its own: where one worker cannot install, none waits for it in the check.
    on_workers "mkdir -p dpojax && tar -xzf dpojax.tar.gz -C dpojax && ./dpojax/tpu_setup.sh install"
  fi
  if is_due check; then
    on_workers "./dpojax/tpu_setup.sh check"
    say "Ready. Start a run, in tmux, with its output on storage that all workers share:"
    say "  gcloud compute tpus tpu-vm ssh $name ${where[*]+${where[*]} }--worker=all --command='cd dpojax && .venv/bin/dpojax train experiments/zephyr_7b_dpo.py --distributed auto --output /mnt/shared/runs/zephyr'"
  fi
}

tpu_vm() {
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" ${where[@]+"${where[@]}"}
}

# What git tracks, and what it would: your own experiments, but no environment and no runs.
copy_checkout() {
  local archive=$scratch/dpojax.tar.gz
  say "Copying $checkout to every worker of $name."
  git -C "$checkout" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [ -e "$checkout/$file" ]; then printf '%s\0' "$file"; fi
    done >"$scratch/files" ||
    fail "$checkout is no git checkout; clone dpojax and run this from there."
  COPYFILE_DISABLE=1 tar -czf "$archive" -C "$checkout" --null -T "$scratch/files"
  tpu_vm scp "$archive" "$name:dpojax.tar.gz" --worker=all ||
    fail "The checkout could not be copied to every worker of '$name'; gcloud's own words are above."
}

on_workers() {
  local log=$scratch/log failed
  if tpu_vm ssh "$name" --worker=all --command="$1" 2>&1 | tee "$log"; then
    return
  fi
  # gcloud says so of each worker of a pod, and nothing where there is only one.
  failed=$(sed -n 's/.*execution on worker \([0-9]*\) failed.*/\1/p' "$log" | sort -nu | paste -sd, -)
  [ -n "$failed" ] || failed="(gcloud says not which)"
  fail "Worker $failed of '$name' failed; its own words are above, and it is safe to run this again."
}

# -- On a TPU VM ------------------------------------------------------------------------

set_up_worker() {
  read_slice
  cd "$checkout"
  if is_due install; then install_checkout; fi
  if is_due check; then check_devices; fi
}

# An attribute of this VM; curl's own status where there is none (22) or no server.
metadata() {
  curl --silent --fail --noproxy '*' --max-time 5 --retry 2 --header 'Metadata-Flavor: Google' \
    "http://$metadata_host/computeMetadata/v1/instance/attributes/$1"
}

read_slice() {
  command -v curl >/dev/null || fail "curl is missing; sudo apt-get install curl."
  local accelerator worker endpoints status=0 lost="This TPU VM's metadata lacks"
  accelerator=$(metadata accelerator-type) || status=$?
  case $status in
    0) ;;
    22) fail "This VM has no TPU; its metadata has no accelerator-type." ;;
    *) fail "No metadata server answers at $metadata_host, so this is no Cloud TPU VM; run this on one, or give --name." ;;
  esac
  worker=$(metadata agent-worker-number) || fail "$lost agent-worker-number; make the TPU VM anew."
  endpoints=$(metadata worker-network-endpoints) || fail "$lost worker-network-endpoints; make the TPU VM anew."
  num_workers=$(tr ',' '\n' <<<"$endpoints" | grep -c .)
  speaker="worker $worker: "
  say "$accelerator, one of $num_workers workers."
  is_first=$([ "$worker" = 0 ] && echo yes || echo no)
}

# By uv, which brings a Python where the image's is old, and nothing where all is there.
install_checkout() {
  local uv=uv
  if ! command -v uv >/dev/null; then
    uv=.uv/bin/uv
    [ -x "$uv" ] || python3 -m pip install --quiet --disable-pip-version-check --target .uv uv ||
      fail "pip could not install uv; sudo apt-get install python3-pip, or install uv, and run this again."
  fi
  if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "Making .venv with Python $python_versions."
    rm -rf .venv
    "$uv" venv --quiet --python "$python_versions" .venv ||
      fail "uv could not bring Python $python_versions; install python3.12 and run this again."
  fi
  # Editable: what is copied here later is what runs.
  "$uv" pip install --quiet --python .venv/bin/python --editable '.[tpu]' ||
    fail "dpojax could not be installed; uv's own words are above."
  say "Installed into $checkout/.venv."
}

check_devices() {
  [ -x .venv/bin/python ] || fail "There is no .venv yet; run ./tpu_setup.sh install."
  [ "$num_workers" -eq 1 ] || say "Waiting for the other workers."
  local found
  found=$(.venv/bin/python -m dpojax.device_check --platform tpu --num-processes "$num_workers") ||
    fail "The check of the devices failed; its own words are above."
  say "$found"
  if [ -z "$stage" ] && [ "$is_first" = yes ]; then
    say "Ready. On every worker: cd $checkout && .venv/bin/dpojax train experiments/NAME.py$([ "$num_workers" -eq 1 ] || echo ' --distributed auto')"
  fi
}

main "$@"
