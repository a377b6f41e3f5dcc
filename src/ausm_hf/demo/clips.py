"""What a visitor has brought: a clip, unpacked into a folder that only this visitor's requests know."""

import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TextIO, cast

import numpy as np
from PIL import Image

from .unpack import Limits, Refused, arguments, shown_size

KEPT_SECONDS = 3600  # files that nobody has used for this long are removed
MOST_GIGABYTES = 8  # of files of all visitors together
# The process that decodes strangers' files gets none of the server's secrets.
PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "HOME", "SYSTEMROOT", "APPDATA", "PYTHONUSERBASE")


@dataclass(frozen=True)
class Clip:
    """
    Attributes:
        folder (`Path`): Where its frames are.
        name (`str`): What the visitor calls it.
        size (`tuple[int, int]`): Height and width in pixels.
        num_frames (`int`): How many there are.
        fps (`float` or `None`): Frames per second, if known.
        times (`list[float]` or `None`): Seconds since the first frame, if known.
        pixel_aspect (`Fraction`): Width by height of a pixel as it is meant to be shown.
        plays (`bool`): Whether all browsers play such files.
    """

    folder: Path
    name: str
    size: tuple[int, int]
    num_frames: int
    fps: float | None
    times: list[float] | None
    pixel_aspect: Fraction = Fraction(1)
    plays: bool = True

    @property
    def sound(self) -> Path | None:
        """The file with its sound; `None` without any."""
        return path if (path := self.folder / "sound.mp4").exists() else None

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height in square pixels."""
        return shown_size(self.size[1], self.size[0], self.pixel_aspect)

    def frame(self, index: int) -> np.ndarray:
        """uint8 RGB array (height, width, 3). Raises Refused for an index out of range, or when it is gone."""
        if not 0 <= index < self.num_frames:
            raise Refused(f"There is no frame {index}; the video has the frames 0 to {self.num_frames - 1}.")
        return _read(self.folder / f"{index:05d}.jpg")

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.part(range(self.num_frames)))

    def part(self, indices: range) -> "Part":
        """Some of its frames, in the order of `indices`, as a video of their own."""
        return Part(self, indices)

    def time(self, index: int) -> float:
        """Seconds since the first frame; guessed from 24 frames per second where the file doesn't say."""
        return self.times[index] if self.times else index / (self.fps or 24)


@dataclass(frozen=True)
class Part:
    """Frames of a clip, read as they are asked for."""

    clip: Clip
    indices: range

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.clip.frame(index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _read(path: Path) -> np.ndarray:
    try:
        return np.array(Image.open(path))
    except OSError as error:
        raise Refused(
            "This video is no longer here: files are removed after an hour. Please upload it again."
        ) from error


def unpack_clip(file: str | os.PathLike, folder: Path, limits: Limits) -> Iterator[np.ndarray | Clip]:
    """
    Decodes a file into `folder`. Yields the first frame as soon as it is there, then the whole clip.

    Raises:
        Refused: if the file is larger than `limits` allow, or is no video that can be shown.
    """
    folder.mkdir(parents=True)
    file = Path(file)
    try:
        size = file.stat().st_size
    except OSError as error:
        raise Refused("The file did not arrive. Please upload it again.") from error
    if size > limits.megabytes * 2**20:
        raise Refused(f"The file has {size / 2**20:.0f} MB; wanted are at most {limits.megabytes} MB.")
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    child = subprocess.Popen(
        arguments(file, folder, limits),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    errors = cast(TextIO, child.stderr)
    try:
        give_up = time.monotonic() + 3 * limits.decoder_seconds
        first = folder / "00000.jpg"
        shown = False
        while child.poll() is None:
            if time.monotonic() > give_up or not folder.exists():
                raise Refused("The video takes too long to decode; a shorter or smaller one will do.")
            if not shown and first.exists():
                shown = True
                yield _read(first)
            time.sleep(0.02)
        message = errors.read().strip().splitlines()
    finally:
        child.kill()
        child.wait()
        errors.close()
    if child.returncode == 3 and message:
        raise Refused(message[-1])
    # Out of memory, out of time, or a decoder that crashed; if all frames are there, it was the sound.
    if child.returncode != 0 and not (folder / "clip.json").exists():
        raise Refused("The video could not be decoded with the memory and the time that there are for it here.")
    facts = json.loads((folder / "clip.json").read_bytes())
    facts |= {"size": tuple(facts["size"]), "pixel_aspect": Fraction(facts["pixel_aspect"])}
    yield Clip(folder, file.stem, **facts)


class Rooms:
    """
    One folder for each visitor, under names that can't be guessed; removed when the visitor leaves or after an hour.

    Args:
        root: The folder for all temporary files; uploads lie there too.
    """

    def __init__(self, root: Path):
        self.root = root
        (root / "rooms").mkdir(parents=True, exist_ok=True)

    def new(self) -> Path:
        """Raises Refused when the visitors' files fill the disk, or are gone because the demo ends."""
        self.check_space()
        room = self.root / "rooms" / secrets.token_urlsafe(24)
        try:
            room.mkdir()
        except FileNotFoundError as error:
            raise Refused("The demo is being stopped.") from error
        return room

    def uploaded(self, file: str) -> str:
        """The path of a file that a visitor uploaded. Raises Refused for any other."""
        if not Path(file).resolve().is_relative_to(self.root.resolve()):
            raise Refused("Please upload the file itself.")
        return file

    def remove(self, path: Path):
        """A folder, or the file that Gradio leaves of an upload that was broken off."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # removed meanwhile
                path.unlink()

    def check_space(self):
        """Raises Refused when the visitors' files fill the disk."""
        if self.is_full():
            raise Refused("There is no room for more videos at the moment. Please try again in an hour.")

    def is_full(self) -> bool:
        size = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with suppress(OSError):  # removed meanwhile
                    size += os.lstat(os.path.join(folder, name)).st_size
        return size > MOST_GIGABYTES * 2**30

    def sweep(self):
        """Removes what nobody has used for so long; and uploads, the oldest first, while the disk is full."""
        uploads = [folder for folder in self.root.iterdir() if folder.name not in ("rooms", "examples")]
        for folder in [*uploads, *(self.root / "rooms").iterdir()]:
            if _last_used(folder) < time.time() - KEPT_SECONDS:
                self.remove(folder)
        for folder in sorted(uploads, key=_last_used):
            if not self.is_full():
                break
            self.remove(folder)


def touch(room: Path):
    """Says that a visitor's folder is in use. Raises Refused if it has been removed."""
    try:
        os.utime(room)
    except OSError as error:
        raise Refused("Your files are no longer here: they are removed after an hour. Please upload again.") from error


def _last_used(folder: Path) -> float:
    """When the folder or anything directly in it was last written."""
    try:
        inside = list(folder.iterdir()) if folder.is_dir() else []
        return max(path.stat().st_mtime for path in [folder, *inside])
    except OSError:  # removed meanwhile
        return time.time()
