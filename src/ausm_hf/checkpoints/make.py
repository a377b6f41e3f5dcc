"""
Makes the checkpoint that comes with the package from a finished training run:

    python -m ausm_hf.checkpoints.make runs/nano

Of several runs, each of which went on from the one before, it takes the mean of the weights, over the runs that have
them where a later run added a part. They are stored as float16, half the size; they load as float32. The recipe and
the log of the last run lie beside them.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ausm_hf import AusmForUniversalSegmentation, AusmImageProcessor, AusmProcessor
from ausm_hf.files import WholeFolder

MAX_BYTES = 15_000_000


def make_checkpoint(runs: list[Path], folder: Path) -> Path:
    """
    Writes the checkpoint of training runs to `folder`, whole or not at all; an older one there is replaced.

    Args:
        runs (`list[Path]`): `output_dir` of each run, with `final/`, `recipe.yaml` and `log.jsonl`.
        folder (`Path`): Where to write it.

    Raises:
        ValueError: If a run is not finished, the runs' networks differ, a weight does not fit into float16, or the
            file gets too large.
    """
    for run in runs:
        if not (run / "final").is_dir():
            raise ValueError(f"{run} has no folder `final`: the run is not finished.")
    models = [AusmForUniversalSegmentation.from_pretrained(run / "final", dtype=torch.float32) for run in runs]
    model, states = models[-1], [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    if any(other[name] != shapes[-1].get(name) for other in shapes for name in other):
        raise ValueError("The networks of the runs differ: their weights have no mean.")
    weights = {
        name: torch.stack([state[name] for state in states if name in state]).mean(dim=0).half()
        if t.is_floating_point()
        else t
        for name, t in states[-1].items()
    }
    infinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"These weights do not fit into float16: {infinite}.")
    # What EfficientNet-Lite's ImageNet weights expect, (x - 127) / 128
    image_processor = AusmImageProcessor(
        size={"shortest_edge": 320, "longest_edge": 640}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    with WholeFolder(folder) as whole:
        partial = whole.partial
        model.config.save_pretrained(partial)
        AusmProcessor(image_processor).save_pretrained(partial)
        for path in partial.iterdir():
            if path.suffix != ".json":
                path.unlink()  # copies of the code, which the package has
                continue
            content = json.loads(path.read_bytes())
            for part in (content, content.get("image_processor", {})):
                part.pop("auto_map", None)
            if path.name == "config.json":
                content["architectures"] = [type(model).__name__]
                content["dtype"] = "float32"
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        size = (partial / "model.safetensors").stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"The weights take {size:,} bytes, at most {MAX_BYTES:,} are wanted.")
        shutil.copyfile(runs[-1] / "log.jsonl", partial / "log.jsonl")
        recipe = yaml.safe_load((runs[-1] / "recipe.yaml").read_bytes())
        # Where things lay on the machine of the run is nobody's business.
        recipe["output_dir"] = Path(recipe["output_dir"]).name
        if recipe["data"].get("root"):
            recipe["data"]["root"] = Path(recipe["data"]["root"]).name
        for source in recipe["data"].get("sources") or []:
            arguments = source.get("arguments", {})
            arguments.update({key: Path(value).name for key, value in arguments.items() if isinstance(value, str)})
        if recipe["model"].get("path"):
            recipe["model"]["path"] = Path(recipe["model"]["path"]).name
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        for path in partial.iterdir():
            path.chmod(0o644)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a training run")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "ausm-nano", help="where to write it")
    args = parser.parse_args()
    print(make_checkpoint(args.runs, args.folder))
