#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 8 minutes:
#
#     bash scripts/gpu_check.sh [OUT_DIR] [--smoke]
#
# A table on the terminal; OUT_DIR/gpu_check.json and gpu_check.log (OUT_DIR: outputs/gpu_check).
# Needs torch, numpy, tiktoken and hydra-core. --smoke tries the script itself on any machine.
set -euo pipefail

out=outputs/gpu_check
if [[ $# -gt 0 && $1 != --* ]]; then
    out=$1
    shift
fi
[[ $out == /* ]] || out=$PWD/$out
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m scripts.gpu_check "$out" "$@"
