"""Checkpoint folders: to start from, and to share on the Hub."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.utils import validate_repo_id

from ._register import BUNDLED_CHECKPOINT
from .files import WholeFolder
from .mask2former import from_mask2former
from .model.configuration_ausm import AusmConfig
from .model.image_processing_ausm import AusmImageProcessor
from .model.modeling_ausm import AusmForUniversalSegmentation
from .model.pipeline_ausm import VideoSegmentationPipeline
from .model.processing_ausm import AusmProcessor
from .segment import fingerprint, load_model


def write_checkpoint(folder: str | os.PathLike, preset: str, mask2former: str | os.PathLike | None = None) -> Path:
    """
    Writes a checkpoint that `AutoModelForUniversalSegmentation.from_pretrained` loads, with its processor, its
    pipeline and the code of all.

    Args:
        folder: Where to write it; must not exist yet, or be empty.
        preset: `"nano"` is the trained checkpoint that comes with the package; `"tiny"` and `"base"` are networks of
            the paper's sizes.
        mask2former: Folder or Hub id of a Mask2Former to start `"tiny"` or `"base"` from, as the paper does; their
            weights are random otherwise.

    Returns:
        The folder.

    Raises:
        ValueError: if there is no such preset, something is in the way, or the Mask2Former doesn't fit.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder {str(folder)!r} exists and is not empty")
    if preset == "nano" and mask2former is not None:
        raise ValueError("preset 'nano' is trained already; only 'tiny' and 'base' can start from a Mask2Former")
    if preset == "nano":
        model = AusmForUniversalSegmentation.from_pretrained(BUNDLED_CHECKPOINT)
        processor = AusmProcessor.from_pretrained(BUNDLED_CHECKPOINT)
    else:
        if mask2former is None:
            model = AusmForUniversalSegmentation(AusmConfig.from_preset(preset))
        else:
            model = from_mask2former(mask2former, preset)
        processor = AusmProcessor(AusmImageProcessor())

    with WholeFolder(folder) as whole:
        VideoSegmentationPipeline(model, processor=processor, device="cpu").save_pretrained(whole.partial)
        if preset == "nano":
            (whole.partial / "README.md").write_text(_NANO_CARD, encoding="utf-8")
    return folder


_NANO_CARD = """---
license: cc-by-nc-4.0
library_name: transformers
---

# ausm-nano

For research and other non-commercial use, as parts of the data that it was trained on are. What these are and how good
it is stands in the MODEL_CARD.md of ausm-hf.
"""


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    results: Iterable[str | os.PathLike] = (),
    license: str | None = None,
    private: bool | None = None,
) -> str:
    """
    Puts a checkpoint on the Hub: weights, processor, the code that loads them where this package is not installed,
    and a model card that says how to use it, how it was trained and what was measured. All in one commit.

    Args:
        folder: A trained checkpoint, as [`~ausm_hf.training.train`] returns it, or any other that `from_pretrained`
            loads. What training needs beside it to go on (the optimizer) stays where it is.
        repo_id: `"user/name"`; made if it doesn't exist. Files of the same names are replaced.
        results: `results.json` files of `ausm evaluate` on this very checkpoint, for the card. Of those without
            `settings["weights"]`, written by hand, you vouch that they are.
        license: Of the weights, as the Hub writes it (`"apache-2.0"`, `"cc-by-nc-4.0"`). Weights that were trained
            from `ausm-nano` are for non-commercial use, as it is.
        private: Whether a new repository is hidden from others; the account's default if not said.

    Returns:
        Where the repository is.

    Raises:
        ValueError: before anything is sent, if the name can't be one, a file of results is none or of another
            checkpoint, or the checkpoint can't be loaded.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses (log in with `hf auth login`).
    """
    validate_repo_id(repo_id)
    own = cache(lambda dtype: fingerprint(*load_model(folder, "cpu", dtype)))  # it depends on how weights are loaded
    measured = [row for path in results for row in _read_results(Path(path), folder, own)]
    model, processor = load_model(folder, device="cpu")
    with tempfile.TemporaryDirectory() as upload:
        VideoSegmentationPipeline(model, processor=processor, device="cpu").save_pretrained(upload)
        card = _model_card(model, Path(folder), repo_id, measured, license)
        (Path(upload) / "README.md").write_text(card, encoding="utf-8")
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=upload, commit_message="Upload AUSM checkpoint")
    return str(url)


_CARD = """---
{metadata}
---

# {name}

A checkpoint of the Autoregressive Universal Video Segmentation Model ([arXiv 2508.19242](https://arxiv.org/abs/2508.19242)), implemented by `ausm-hf`. It follows the objects that are marked in the first frame of a video, or finds and follows objects by itself, one frame at a time, with a state of constant size.

## Use

```python
from transformers import pipeline

segment = pipeline("video-segmentation", model="{repo_id}", trust_remote_code=True)
for objects in segment("video.mp4", stream=True):
    print([(item["id"], item["label"], item["score"]) for item in objects])
```

With `import ausm_hf` the model's code comes from that package, and `trust_remote_code` is not needed.

## Network

{network}

## Training

{training}

## Results

{results}
"""  # noqa: E501


def _model_card(
    model: AusmForUniversalSegmentation, folder: Path, repo_id: str, measured: list[dict], license: str | None
) -> str:
    config, name = model.config, repo_id.split("/")[-1]
    labels = "; ".join(f"{key} ({len(names)})" for key, names in config.label_sets.items())
    network = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "backbone": config.backbone_config.model_type,
        "label sets (labels)": labels,
        "objects at once": f"at most {config.num_id_vectors}",
    }
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["video-segmentation", "video-object-segmentation", "video-instance-segmentation", "custom_code"],
        model_name=name if measured else None,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=row["benchmark"],
                dataset_name=row["benchmark"],
                dataset_split=row["split"],
                metric_type=key,
                metric_name=f"{key} ({row['mode']}, {row['measure']})",
                metric_value=round(100 * value, 1),
            )
            for row in measured
            for key, value in row["scores"].items()
        ]
        or None,
    )
    results = "Nothing has been measured."
    if measured:
        rows = [
            [row["benchmark"], row["split"], row["mode"], row["measure"], key, f"{100 * value:.1f}"]
            for row in measured
            for key, value in row["scores"].items()
        ]
        results = _table(["benchmark", "split", "mode", "measure", "", "%"], rows)
    return _CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        repo_id=repo_id,
        network=_table(["", ""], network.items()),
        training=_training_facts(folder),
        results=results,
    )


def _training_facts(folder: Path) -> str:
    """A table of what the recipe says that training left beside a checkpoint; some other recipe.yaml says nothing."""
    for place in (folder, folder.resolve().parent):
        with suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return _table(["", ""], _facts_of_recipe(folder, yaml.safe_load((place / "recipe.yaml").read_bytes())))
    return "The checkpoint does not say how it was trained."


def _facts_of_recipe(folder: Path, recipe: dict) -> Iterable[Iterable]:
    model, data, optim = recipe["model"], recipe["data"], recipe["optim"]
    start = model["preset"] if model["path"] is None else Path(model["path"]).name
    # Names of data sets, not where they lay.
    sources = [data["mixture"]] if data["mixture"] else [source["dataset"] for source in data["sources"] or []]
    steps = optim["max_steps"]
    if (folder / "state.json").is_file():  # a checkpoint in the middle of the run
        steps = f"{json.loads((folder / 'state.json').read_bytes())['step']} of {steps}"
    return {
        "started from": start,
        "data": ", ".join(dict.fromkeys(sources)),
        "form": recipe["mode"],
        "frames per clip": data["num_frames"],
        "frame size (height x width)": " x ".join(map(str, data["size"])),
        "clips per process and pass": data["batch_size"],
        "steps": steps,
        "learning rate": optim["lr"],
        "backbone": "frozen" if recipe["freeze_backbone"] else "trained",
    }.items()


def _table(head: list[str], rows: Iterable[Iterable]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _read_results(path: Path, folder: str | os.PathLike, own: Callable[[str], str]) -> list[dict]:
    """`benchmark`, `split`, `mode`, `measure` and `scores` (fractions of 1) of each measure in a `results.json`."""
    try:
        content = json.loads(path.read_bytes())
        settings = content["settings"]
        about = {key: settings[key] for key in ("benchmark", "split", "mode")}
        if content.get("not_scored"):
            about["split"] += f" ({settings['videos'] - len(content['not_scored'])} of {settings['videos']} videos)"
        measures = content["scores"].items()
        weights, dtype = settings.get("weights"), settings.get("dtype", "auto")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results {str(path)!r} can't be read: wanted is a results.json of `ausm evaluate`"
        ) from error
    if weights is not None and weights != own(dtype):
        raise ValueError(
            f"results {str(path)!r} are of other weights or settings ({weights}) than checkpoint {str(folder)!r} "
            f"({own(dtype)}); wanted is what `ausm evaluate --model {folder}` writes"
        )
    return [
        {
            **about,
            "measure": measure,
            "scores": {
                key: value
                for key, value in scores.items()
                if isinstance(value, float) and not key.endswith(("_recall", "_decay"))
            },
        }
        for measure, scores in measures
    ]


__all__ = ["push_checkpoint", "write_checkpoint"]
