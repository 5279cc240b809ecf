#!/usr/bin/env bash
# The study of docs/results: ten optimizers on a GPT-2 of 0.8 M parameters, one budget, one order of
# the data; the learning rate of each swept until its optimum lies inside a grid of factor two, then
# one of 1.41 around the best, then three seeds.
#
#     bash scripts/study.sh                                     the standard library's source, bytes
#     bash scripts/study.sh runs/study data=text 'data.files=[a.jsonl.xz,book.txt]'
#
# The first argument is the folder (runs/study); what follows are settings for all runs. Stopped or
# killed, the same command continues it. Environment: JOBS, trials at a time (one per CPU core);
# OPTIMIZERS, some of those below; PYTHON. What it takes, and how to publish what comes of it:
# docs/experiments.md.
#
# What is equal for all: model, data and their order, 1,000 updates of 2,048 tokens, warm-up over a
# tenth, cosine to a tenth, clip at 1, no setting tuned but the learning rate. Second moments have
# beta2 = 0.99 everywhere: batches are small, and MARS's authors' 0.99 against AdamW's 0.95 would be a
# second difference. Where matrices take another rule, the rest takes AdamW, at the middle of the grid
# with AdamW's usual 5e-3 for this model.
set -euo pipefail
out=${1:-runs/study}
[[ $out == *=* ]] && { echo "the first argument is the folder, given $out" >&2; exit 1; }
shift || true
[[ $out == /* ]] || out=$PWD/$out
settings=("$@")
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# study OPTIMIZER GRID [SETTINGS...]: sweep, extend, refine, seeds at the best
study() {
    local optimizer=$1 grid=$2
    shift 2
    if [[ -n ${OPTIMIZERS:-} && " $OPTIMIZERS " != *" $optimizer "* ]]; then
        return
    fi
    echo "== $optimizer"
    "$python" -m scripts.sweep "$out/$optimizer" +experiment=study/_base \
        "optim=$optimizer" "optim.lr=$grid" "$@" "${settings[@]}" \
        --extend optim.lr --refine 1 --then seed=2,3 --jobs "$jobs"
}

adamw='optim.groups.others.betas=[0.9,0.99]'
study adamw 2.5e-3,5e-3,1e-2 'optim.betas=[0.9,0.99]'
study nadamw 2.5e-3,5e-3,1e-2 'optim.betas=[0.9,0.99]'
study lion 5e-4,1e-3,2e-3
study muon 1e-2,2e-2,4e-2 "$adamw" optim.groups.others.lr_scale=0.25
study shampoo 2.5e-3,5e-3,1e-2 "$adamw" 'optim.betas=[0.95,0.99]' optim.grafting_beta2=0.99
study soap 2.5e-3,5e-3,1e-2 "$adamw" 'optim.betas=[0.95,0.99]' optim.shampoo_beta=0.99
study mars_adamw 5e-3,1e-2,2e-2 'optim.groups.vectors.betas=[0.9,0.99]'
study mars_lion 5e-4,1e-3,2e-3 'optim.groups.vectors.betas=[0.9,0.99]'
study came 1e-3,2e-3,4e-3 'optim.betas=[0.9,0.99,0.999]'
study sinkgd 1e-2,2e-2,4e-2 "$adamw" +optim.groups.others.lr_scale=0.25

"$python" -m report.sweep "$out" "out=$out/report/sweep"
mapfile -t best < <(cat "$out"/*/best_runs.txt)
"$python" -m report.compare "${best[@]}" "out=$out/report/compare" baseline=adamw
