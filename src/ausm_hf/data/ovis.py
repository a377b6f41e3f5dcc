"""OVIS in the official layout."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .vis_json import vis_json


def ovis(root: str, split: str = "train") -> Dataset:
    """Index OVIS.

    Args:
        root: Folder with `<split>/<video>/` and `annotations_<split>.json`.
        split: `"train"`, `"valid"` or `"test"`.

    Raises:
        ValueError: The JSON isn't there or doesn't fit.
    """
    return vis_json(str(Path(root) / split), str(Path(root) / f"annotations_{split}.json"), "ovis")
