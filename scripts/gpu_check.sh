#!/usr/bin/env bash
# Everything that only a GPU can show, in at most 8 minutes:
#
#     bash scripts/gpu_check.sh [OUT_DIR] [--smoke]
#
# Tables and verdicts on the terminal and in OUT_DIR/benchmarks.md, every figure in gpu_check.json,
# real runs with their curves in training/ (OUT_DIR: outputs/gpu_check). DATA="data=text ..." gives
# them another text than the Python standard library; relative paths in it begin at the repository's
# root, and data.tokenizer=gpt2 wants the network or GPT2_BPE_DIR=FOLDER (README.md, Data).
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
