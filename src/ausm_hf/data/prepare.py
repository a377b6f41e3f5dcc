"""Unpack packed DAVIS sequences and zipped stills: `python -m ausm_hf.data.prepare SOURCE DESTINATION`.

SOURCE holds `davis2016/<sequence>.mp4` with `<sequence>.zip` (one mask PNG per frame) and `stills/<set>.zip`.
DESTINATION gets `davis/` in the official DAVIS layout (`ImageSets/2016/train.txt` and `dev.txt`) and `stills/<set>/`.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from ..files import WholeFolder

DEV_SEQUENCES = ("breakdance-flare", "car-turn", "dog-agility", "horsejump-low", "lucia")


def prepare(source: str | Path, destination: str | Path) -> None:
    """Unpack what isn't there yet. A part is written beside its place and renamed, so it is there whole or not at all.

    Raises:
        ValueError: `source` lacks `davis2016/` or `stills/`, or a sequence has more or fewer masks than frames.
    """
    source, destination = Path(source), Path(destination)
    for part in ("davis2016", "stills"):
        if not (source / part).is_dir():
            raise ValueError(f"source {str(source)!r} has no folder {part!r}")
    _build(destination / "davis", _unpack_davis, source / "davis2016")
    for packed in sorted((source / "stills").glob("*.zip")):
        _build(destination / "stills" / packed.stem, _unpack_zip, packed)


def _build(folder: Path, unpack: Callable[[Path, Path], None], source: Path) -> None:
    if not folder.exists():
        with WholeFolder(folder) as whole:
            unpack(source, whole.partial)


def _unpack_zip(source: Path, folder: Path) -> None:
    with zipfile.ZipFile(source) as packed:
        packed.extractall(folder)


def _unpack_davis(source: Path, folder: Path) -> None:
    names = sorted(video.stem for video in source.glob("*.mp4"))
    for name in names:
        frames = folder / "JPEGImages" / "480p" / name
        masks = folder / "Annotations" / "480p" / name
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        count = 0
        for image in _decode(source / f"{name}.mp4"):
            image.save(frames / f"{count:05d}.jpg", quality=92)
            count += 1
        with zipfile.ZipFile(source / f"{name}.zip") as packed:
            if len(packed.namelist()) != count:
                raise ValueError(f"{name}: {count} frames, {len(packed.namelist())} masks")
            for mask in packed.namelist():
                Image.open(io.BytesIO(packed.read(mask))).save(masks / mask)
    sets = folder / "ImageSets" / "2016"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("".join(f"{n}\n" for n in names if n not in DEV_SEQUENCES), encoding="utf-8")
    (sets / "dev.txt").write_text("".join(f"{n}\n" for n in names if n in DEV_SEQUENCES), encoding="utf-8")


def _decode(video: Path) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError:
        # Images for accelerators often have OpenCV and no PyAV.
        import cv2

        capture = cv2.VideoCapture(str(video))
        while (pixels := capture.read()[1]) is not None:
            yield Image.fromarray(pixels[:, :, ::-1])
        return
    with av.open(str(video)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("destination")
    arguments = parser.parse_args()
    prepare(arguments.source, arguments.destination)
