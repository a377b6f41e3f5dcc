#!/usr/bin/env bash
# One command, under 10 minutes, on a machine with a GPU: see scan.py. --dry-run rehearses it on the CPU.
set -euo pipefail
exec "${PYTHON:-python3}" -u "$(dirname "$0")/scan.py" "$@"
