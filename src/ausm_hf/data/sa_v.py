"""SA-V: videos with a JSON each (train), or folders of frames and one mask folder per object (val, test)."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from .clips import clip_row, clips_from_rows, file
from .mask_folders import folder_row, need


def sa_v(root: str, split: str = "train", annotations: str = "manual") -> Dataset:
    """Index SA-V. Masks may overlap and are prompts only.

    Train rows hold the annotated frames of their video. The JSONs of train are large, so they are read when a row is
    used (`resolve_row`), not here.

    Args:
        root: For train, a folder with `<video>.mp4` and `<video>_manual.json` (or `_auto.json`) at any depth
            (`sav_train/sav_000/`, ...). For other splits, a folder with `JPEGImages_24fps/`, `Annotations_6fps/` and
            `sav_<split>.txt`.
        split: `"train"`, `"val"` or `"test"`.
        annotations: `"manual"` or `"auto"`, for train.

    Raises:
        ValueError: An argument is unknown, or nothing is found for it.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is {split!r}, want 'train', 'val' or 'test'")
    if annotations not in ("manual", "auto"):
        raise ValueError(f"annotations is {annotations!r}, want 'manual' or 'auto'")
    folder = need(Path(root), "root of SA-V")
    if split != "train":
        names = need(folder / f"sav_{split}.txt", f"split {split!r} of SA-V").read_text(encoding="utf-8").split()
        return clips_from_rows(
            folder_row(
                name,
                folder / "JPEGImages_24fps" / name,
                folder / "Annotations_6fps" / name,
                exhaustive=False,
                first_frame_given=True,
            )
            for name in names
        )
    files = sorted(folder.rglob(f"*_{annotations}.json"))
    if not files:
        raise ValueError(f"root of SA-V: {folder} holds no *_{annotations}.json")
    rows = []
    for annotation in files:
        name = annotation.name.removesuffix(f"_{annotations}.json")
        rows.append(
            clip_row(
                name,
                [],
                [],
                video=file(annotation.with_name(f"{name}.mp4")),
                annotation_file=str(annotation),
                exhaustive=False,
                first_frame_given=True,
            )
        )
    return clips_from_rows(rows)
