"""Fine-tunes AUSM on a folder of your own videos. Copy this file and change what you need.

    my_videos/videos/dive.mp4         a video, or a folder of frames: my_videos/videos/dive/00000.jpg
    my_videos/masks/dive/00012.png    the mask of frame 12: an indexed PNG, 0 is background, 1 to 254 are objects,
                                      255 marks pixels of which nothing is known
    my_videos/labels.json             optional: {"dive": {"1": "fish"}}

    python examples/finetune_on_your_videos.py my_videos runs/finetune
    ausm segment another.mp4 --model runs/finetune/final

Stop it whenever you like: the same command goes on from the newest checkpoint.
"""

import argparse
import json
from pathlib import Path

from ausm_hf import write_checkpoint
from ausm_hf.training import recipe_from_dict, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", type=Path, help="folder with videos/, masks/ and perhaps labels.json")
    parser.add_argument("output", type=Path, help="folder for checkpoints and, at the end, final/")
    parser.add_argument("--model", help="checkpoint to start from (default: the ausm-nano of the package)")
    parser.add_argument("--label-set", default="mine", help="name for the labels of labels.json (default: mine)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=4, help="frames per clip (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=[192, 320], help="height and width, multiples of 32")
    arguments = parser.parse_args()
    if arguments.model is None:
        arguments.model = arguments.output / "ausm-nano"
        if not arguments.model.exists():
            write_checkpoint(arguments.model, "nano")

    # Whether every object that counts has a mask: then the network learns to find such objects by itself, too.
    exhaustive = True
    data = {"root": str(arguments.videos), "exhaustive": exhaustive}
    model = {"path": str(arguments.model)}
    if (listed := arguments.videos / "labels.json").is_file():
        objects = json.loads(listed.read_text(encoding="utf-8-sig")).values()
        if labels := sorted({label for of_video in objects for label in of_video.values() if label}):
            # All the names that the result knows; `"coco": None` beside them keeps those of COCO.
            model["label_sets"] = {arguments.label_set: labels}
            data["label_set"] = arguments.label_set
    source = {"dataset": "video_folder", "arguments": data, "strides": [1, 2, 3], "paste": 0.3, "donor": True}
    recipe = {
        "output_dir": str(arguments.output),
        "model": model,
        "data": {"sources": [source], "num_frames": arguments.frames, "size": arguments.size, "batch_size": 3},
        "optim": {"lr": 1e-4, "warmup_steps": min(50, arguments.steps // 10), "max_steps": arguments.steps},
        "history_corruption": 0.25,
        "save_every": 200,
    }
    print(f"trained: {train(recipe_from_dict(recipe))}")


if __name__ == "__main__":
    main()
