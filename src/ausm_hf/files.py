"""Files and folders: in which order they are read; written whole or not at all."""

import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


def natural_order(path: Path) -> list:
    """Sort key of a path under which numbers count as numbers: `2.png` before `10.png`."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def visible(folder: Path) -> list[Path]:
    """What is in a folder, but for the hidden files that systems leave there; nothing if the folder isn't there."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def image_files(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """The visible images of a folder, numbers in their names counting as numbers."""
    return sorted((path for path in visible(folder) if path.suffix.lower() in suffixes), key=natural_order)


class WholeOrNothing:
    """What is written to `partial` within its `with` block appears under `path` at the end, or not at all.

    `partial` is a hidden sibling, `.NAME.partial-xxxxxxxx.SUFFIX`. When the block ends well it takes the place of
    `path` and of what may have been there; when it ends in an exception it is removed, and `path` is as it was.
    Missing parent folders are made, and on an exception removed again. Of several outputs that belong together, call
    `finish` on each before the blocks end: what can go wrong has then happened before the first of them appears.

    Subclasses, the writers of results, fill in `_start` (open `self.partial`), `_finish` (complete it) and `_release`
    (close it, however the block ended; may be called after `_finish`).

    ```python
    with WholeOrNothing("out/results.json") as file:
        file.partial.write_text(content)
    ```
    """

    _makes_folder = False

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.partial: Path = None  # type: ignore[assignment]  # there is one inside the block only
        if self.path.exists() and self.path.is_dir() != self._makes_folder:
            is_one, wanted = ("file", "folder") if self._makes_folder else ("folder", "file")
            raise ValueError(f"path {str(path)!r} is a {is_one}; wanted is a {wanted} to write")
        if no_folder := [str(parent) for parent in self.path.parents if parent.exists() and not parent.is_dir()]:
            raise ValueError(f"path {str(path)!r} can't be written: {no_folder[0]!r} is no folder")

    def __enter__(self):
        self._finished = False
        self._made = [parent for parent in self.path.absolute().parents if not parent.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = self.path.with_name(f".{self.path.stem}.partial-{uuid.uuid4().hex[:8]}{self.path.suffix}")
        try:
            self._start()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, exception_type, exception, traceback):
        try:
            if exception_type is None:
                self.finish()
                self._publish()
        finally:
            self._clean_up()

    def finish(self) -> None:
        """Completes the output, still under its hidden name; nothing more can be written."""
        if not self._finished:
            self._finish()
            self._finished = True

    def _publish(self):
        os.replace(self.partial, self.path)

    def _clean_up(self):
        self._release()
        if self.partial.is_dir():
            shutil.rmtree(self.partial)
        else:
            self.partial.unlink(missing_ok=True)
        self.partial = None  # type: ignore[assignment]
        for parent in self._made:
            with suppress(OSError):  # not empty: it holds results
                parent.rmdir()

    def _check_open(self):
        if self.partial is None or self._finished:
            raise ValueError(f"{type(self).__name__} writes only inside its `with` block and before it is finished")

    def _start(self):
        pass

    def _finish(self):
        pass

    def _release(self):
        pass


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file of UTF-8, whole or not at all."""
    with WholeOrNothing(path) as file:
        file.partial.write_text(text, encoding="utf-8")


class WholeFolder(WholeOrNothing):
    """A folder, likewise: `partial` is one, and takes the place of an older `path` with all that is in it."""

    _makes_folder = True

    def _start(self):
        self.partial.mkdir()

    def _publish(self):
        # A folder with files in it can't be replaced in one go, so the old one steps aside first.
        old = self.path.with_name(f".{self.path.name}.old-{uuid.uuid4().hex[:8]}")
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self.partial, self.path)
        if old.is_symlink():
            old.unlink()
        else:
            shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what a process that was killed while it wrote into a folder left there under hidden names."""
    for path in folder.glob(".*"):
        if not re.search(r"\.(partial|old)-[0-9a-f]{8}(\.[^.]+)?$", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
