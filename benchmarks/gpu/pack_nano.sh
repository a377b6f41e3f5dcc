#!/usr/bin/env bash
# Gathers what train_nano.sh needs on a machine without internet, to travel with the repository:
#
#   benchmarks/gpu/pack_nano.sh SOURCE [FOLDER [PYTHON_VERSION]]
#
# SOURCE holds davis2016/ and stills/, packed as `python -m ausm_hf.data.prepare` takes them. FOLDER (.gpu-nano by
# default) gets them and the wheels of `datasets`.
set -euo pipefail
source_folder=${1:?usage: pack_nano.sh SOURCE [FOLDER]}
folder=${2:-.gpu-nano}
mkdir -p "$folder/wheels"
cp -r "$source_folder/davis2016" "$source_folder/stills" "$folder/"
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${3:-3.12}" -d "$folder/wheels" datasets dill multiprocess
du -sh "$folder"
