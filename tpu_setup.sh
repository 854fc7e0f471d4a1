#!/usr/bin/env bash
# Takes a TPU VM that has Python 3.11 or later to a working dpojax, from a checkout of it.
# Safe to run again. On a pod, run it on every worker:
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command 'cd dpojax && ./tpu_setup.sh'
set -euo pipefail
cd "$(dirname "$0")"

python=""
for candidate in python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "dpojax needs Python 3.11 or later; install it (for example python3.12) and run this again." >&2
  exit 1
fi

[ -d .venv ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet '.[tpu]'
.venv/bin/python - <<'PYTHON'
import jax

devices = jax.local_devices()
if devices[0].platform != "tpu":
    raise SystemExit(f"No TPU is visible, only {devices}; is another process using it?")
print(f"{len(devices)} local devices of kind {devices[0].device_kind}")
PYTHON
echo "Ready: .venv/bin/dpojax train"
