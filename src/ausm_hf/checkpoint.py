"""Checkpoint folders to start from."""

import os
import shutil
import uuid
from pathlib import Path

from ._register import BUNDLED_CHECKPOINT
from .mask2former import from_mask2former
from .model.configuration_ausm import AusmConfig
from .model.image_processing_ausm import AusmImageProcessor
from .model.modeling_ausm import AusmForUniversalSegmentation
from .model.pipeline_ausm import VideoSegmentationPipeline
from .model.processing_ausm import AusmProcessor


def write_checkpoint(folder: str | os.PathLike, preset: str, mask2former: str | os.PathLike | None = None) -> Path:
    """
    Writes a checkpoint that `AutoModel.from_pretrained` loads, with its processor, its pipeline and the code of all.

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

    partial = folder.absolute().with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        VideoSegmentationPipeline(model, processor=processor, device="cpu").save_pretrained(partial)
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


__all__ = ["write_checkpoint"]
