#!/usr/bin/env bash
# Trains ausm-nano further on one GPU, from the checkpoint that comes with the package, and gives back weights that are
# small enough to travel (float16, one file below 15 MB):
#
#   benchmarks/gpu/train_nano.sh FOLDER OUT [KEY=VALUE ...]     FOLDER as pack_nano.sh made it
#   benchmarks/gpu/train_nano.sh --dry-run FOLDER OUT           two steps on the CPU
#
# KEY=VALUE changes the recipe, examples/recipes/nano_gpu.yaml; `model.path=OUT/ausm-nano` goes on from an earlier call.
# Needs torch, transformers, accelerate, scipy and either PyAV or OpenCV; no internet.
set -euo pipefail
cd "$(dirname "$0")/../.."
options=()
if [ "${1:-}" = --dry-run ]; then
    shift
    options=(optim.max_steps=2 optim.warmup_steps=1 data.batch_size=2 data.num_frames=2 data.workers=0
        mixed_precision=no log_every=1 save_every=2)
fi
folder=$(realpath "${1:?usage: train_nano.sh [--dry-run] FOLDER OUT [KEY=VALUE ...]}")
out=$(realpath -m "${2:?usage: train_nano.sh [--dry-run] FOLDER OUT [KEY=VALUE ...]}")
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$work/site"
python3 -c "import datasets" 2>/dev/null ||
    python3 -m pip install -q --no-index --no-deps --target "$work/site" "$folder"/wheels/*.whl
python3 -m ausm_hf.data.prepare "$folder" "$work/data"
python3 examples/train.py examples/recipes/nano_gpu.yaml data.root="$work/data" output_dir="$work/run" \
    "${options[@]}" "$@" 2>&1 | tee "$out/train.txt"
python3 -m ausm_hf.checkpoints.make "$work/run" --folder "$out/ausm-nano"
ls -l "$out/ausm-nano"
