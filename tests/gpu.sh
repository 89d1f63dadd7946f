#!/usr/bin/env bash
# What a GPU has to pass, in under 8 minutes, and the tables of docs/PERFORMANCE.md, which also go to $OUT/gpu.md.
# Needs torch, pydantic, pyyaml, numpy, tokenizers, filelock, tqdm and pytest-xdist; no network, wandb or datasets.
# Without CUDA the same commands run on tiny shapes, so that they cannot rot; REQUIRE_CUDA=1 makes that a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
report=${OUT:-$(mktemp -d)}/gpu.md
export BENCH_ROUNDS=1

if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    runs=(pile_llama_simple_mlp-4L-768:64 pile_llama_simple_mlp-12L-768:32)
    # few are compiled: of twelve layers that takes a minute
    export BENCH_STEPS="^models.py, compiled|nanoGPT.*compiled|Llama$"
elif [ -n "${REQUIRE_CUDA:-}" ]; then
    echo "gpu: torch finds no CUDA" >&2
    exit 1
else
    echo "gpu: no CUDA: this checks the script, not a GPU"
    runs=(quickstart:1)
    export TEST_DEVICE=cpu BENCH_STEPS="(nanoGPT's|Llama)$" OMP_NUM_THREADS=1
fi

tests=$(python3 -m pytest -n 0 -rs -p no:cacheprovider -p no:logging tests/test_models.py tests/test_cuda.py -k cuda | tee >(cat >&2))
if [ -z "${TEST_DEVICE:-}" ] && grep -q skipped <<<"$tests"; then
    echo "gpu: a test that was skipped has not passed" >&2
    exit 1
fi

for run in "${runs[@]}"; do
    export BENCH_CONFIG=configs/${run%:*}.yaml BENCH_SEQUENCES=${run#*:}
    python3 tests/bench.py step memory loop
done | tee "$report"
echo "gpu: passed; the tables are in $report"
