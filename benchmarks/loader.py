"""
Does the loader keep up with training?

    python benchmarks/loader.py RECIPE [KEY=VALUE ...] [--batches 8] [--output FOLDER]

Clips and batches as the recipe has them, made in one process: processor time per frame of drawing, decoding, warping,
pasting and colouring a clip, and of normalising and stacking a batch. Then frames per second of as many loader
processes as there are cores, with nothing else running. A training run itself says in `log.jsonl` how long it waited
(`waiting_for_data`). The floor is one read of the frames as they lie on disk and one write of the batch, at the rate
of a copy in memory; decoding is not in it.
"""

import argparse
import time
from pathlib import Path

import torch
from common import copy_rate, machine, print_table, write_results

from ausm_hf.training import load_recipe
from ausm_hf.training.data import build_data
from ausm_hf.training.loop import build_config, build_processor, load_batches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a loader process
    cores = machine()["cores"]
    recipe = load_recipe(args.recipe, [*args.overrides, f"data.workers={cores}", f"optim.max_steps={args.batches}"])
    config = build_config(recipe)
    clips, collator = build_data(recipe, config, build_processor(recipe, config).image_processor)

    def frames_of(batch: dict) -> int:
        return batch["pixel_values_videos"].shape[:2].numel()

    size, row = recipe.data.batch_size, {"recipe": Path(args.recipe).name}
    clips[0]
    start = time.process_time()
    drawn = [clips[i] for i in range(size * args.batches)]
    middle = time.process_time()
    frames = sum(frames_of(collator(drawn[i : i + size])) for i in range(0, len(drawn), size))
    row["clip ms"] = 1e3 * (middle - start) / frames
    row["batch ms"] = 1e3 * (time.process_time() - middle) / frames
    row["floor ms"] = 1e3 * 5 * 3 * recipe.data.size[0] * recipe.data.size[1] / copy_rate()
    start = time.perf_counter()
    frames = sum(frames_of(batch) for _, batch in load_batches(recipe, clips, collator, 0, 0, 1))
    row |= {"processes": cores, "frames per second": frames / (time.perf_counter() - start)}
    print_table([row], row)
    write_results("loader", [row], args.output, frames=recipe.data.num_frames, size=list(recipe.data.size))


if __name__ == "__main__":
    main()
