"""Thousands of videos: each segmented once, by any number of processes on any number of machines that share a folder.

The processes need not know of each other, nor start or end together. They agree through files in the output folder:

    OUT/<video>/                      the results of one video, and `video.json`: its line of the manifest, and the
                                      `version` of the video that they are of
    OUT/manifest.jsonl                a line for each video that is done or failed
    OUT/.ausm/settings.json           what the results are made with
    OUT/.ausm/failed/<video>.json     a failed video's line of the manifest
    OUT/.ausm/claims/<video>.<n>.claim    who works on it; n counts how often it was taken over
    OUT/.ausm/work/<video>.<n>.work/      results that are being written

**Once.** A process claims a video by making its claim file, which only one can do (`O_EXCL`), and then touches it
every few seconds. A claim is dead when it has not been touched for `LEASE` seconds (by the file server's clock, so
that those of the machines may differ), or at once when its process ran on this machine and is gone. The next process
then takes the video over by making claim n + 1, which again only one can do. Should the dead wake up, it finds that
there is a newer claim, and drops its work.

**Whole.** Results are written under `.ausm/work` and renamed into place with all that belongs to them. That the folder
is there *is* what says that the video is done, so no crash can leave the two apart. The manifest is only gathered from
these folders and from `.ausm/failed`. A video whose file, or a file in whose folder, has changed since (by its size or
time) is done again; one that has failed is tried again by whatever process starts after that.

**The same.** A video's results don't depend on which process made them, in which order, or how often the work was
interrupted. To the byte they are the same where the processes are alike: the same kind of processor or GPU, the same
torch, and the same number of threads, since sums over another number of threads are rounded otherwise. `torchrun`
gives each of several processes one thread unless `OMP_NUM_THREADS` says another number; set it for a run that is to be
compared. Otherwise scores differ in their last digits, and masks in pixels that hang on a hair. Overlays are not the
same to the byte: now and then x264 encodes the same frames in another way.
"""

import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath

from .files import IMAGE_SUFFIXES, image_files
from .video import STREAM_SCHEMES, is_pattern

LEASE = 60.0  # seconds after which a claim that nobody touches is dead
MANIFEST_EVERY = 10.0  # seconds between two writings of the manifest


def are_many(inputs: list[str]) -> bool:
    """Whether `inputs` name videos, rather than one: several, or a pattern, but not one of the images of one video.

    Raises:
        ValueError: if they are the images of one folder, as a shell makes it of a pattern: one video is meant.
    """
    if len(inputs) > 1 and all(path.lower().endswith(IMAGE_SUFFIXES) for path in inputs):
        folders = {os.path.dirname(os.path.abspath(path)) for path in inputs}
        if len(folders) == 1 and not any(map(is_pattern, inputs)):
            raise ValueError(
                f"INPUT is {len(inputs)} images of the folder {folders.pop()!r}, each a video of one frame; for one "
                "video of them quote the pattern, or name the folder"
            )
    if len(inputs) != 1 or not is_pattern(inputs[0]):
        return len(inputs) > 1
    return not all(path.lower().endswith(IMAGE_SUFFIXES) for path in glob(inputs[0], recursive=True))


def _goes_round(path: str, root: str) -> bool:
    """Whether a path comes through the same folder twice below `root`, by a link to a folder above."""
    parents = [parent for parent in Path(os.path.abspath(path)).parents if parent.is_relative_to(root)]
    return len({os.path.realpath(parent) for parent in parents}) < len(parents)


def find_videos(inputs: Iterable[str | os.PathLike], output: str | os.PathLike | None = None) -> dict[str, str]:
    """The videos that `inputs` name.

    Args:
        inputs: paths of videos or of folders of frames, and glob patterns (`**` for folders within folders): the
            files that a pattern matches or, if there are none, the folders.
        output: the folder that results are written to: an overlay in it is no video that a pattern means.

    Returns:
        dict from name to path, in the order of the names. A name is the path without its suffix, relative to the
        folder that all inputs have in common; with the suffix if another video has the same name, or one within it.

    Raises:
        ValueError: if there are no inputs or nothing is there, or two videos can't be told apart by name.
    """
    paths, roots = [], []
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    output = None if output is None else Path(os.path.abspath(output))
    for given in inputs:
        location = os.fspath(given)
        if is_pattern(location):
            parts = Path(location).parts  # the root is the folders before the first wildcard
            wild = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
            roots.append(os.path.abspath(os.path.join(".", *parts[:wild])))
            matches = [path for path in sorted(glob(location, recursive=True)) if not _goes_round(path, roots[-1])]
            if output is not None:
                matches = [path for path in matches if not _is_result(path, output, Path(roots[-1]))]
            files = [path for path in matches if os.path.isfile(path)]
            if not matches:
                raise ValueError(f"pattern {location!r} matches no file")
            paths += files or matches
        elif os.path.exists(location):
            paths.append(location)
            roots.append(os.path.dirname(os.path.abspath(location)))
        elif location == "-" or location.startswith((*STREAM_SCHEMES, "camera:")):  # a URL may hold a password
            raise ValueError("a URL, a camera or - is among several inputs; wanted is one such at a time")
        else:
            raise ValueError(f"source {location!r}: no such file or folder")
    if not paths:
        raise ValueError("inputs is empty; wanted is at least one video")
    root = os.path.commonpath(roots)
    paths = list({os.path.abspath(path): path for path in paths}.values())
    full = [PurePosixPath(Path(os.path.relpath(os.path.abspath(path), root)).as_posix()) for path in paths]
    stems = [name if os.path.isdir(path) else name.with_suffix("") for name, path in zip(full, paths)]
    # Many disks take `Clip` and `clip` for one folder.
    lower = [PurePosixPath(str(stem).lower()) for stem in stems]
    times = Counter(lower)
    folders = {PurePosixPath("manifest.jsonl"), *(parent for stem in lower for parent in stem.parents)}
    names = [name if times[key] > 1 or key in folders else stem for name, stem, key in zip(full, stems, lower)]
    videos = {str(name): path for name, path in zip(names, paths)}
    lower = [PurePosixPath(str(name).lower()) for name in names]
    times = Counter(lower)
    if clashes := [str(name) for name, key in zip(names, lower) if times[key] > 1 or key in folders]:
        raise ValueError(
            f"the results of {clashes[0]!r} would lie among those of another video; rename one of the two"
        )
    return dict(sorted(videos.items()))


def _is_result(path: str, output: Path, root: Path) -> bool:
    """Whether a pattern, which looks into the folders of `root`, came upon `path` among the results in `output`."""
    absolute = Path(os.path.abspath(path))
    if output not in (absolute, *absolute.parents):
        return False
    if root in output.parents:
        return True
    # The videos may lie in `output` themselves, each beside the folder of its results.
    within = absolute.relative_to(output).parents
    return any((output / folder / "video.json").exists() for folder in within)


def work_through(
    videos: dict[str, str],
    output: str | os.PathLike,
    work: Callable[[str, Path], dict],
    settings: dict,
) -> Iterator[dict]:
    """Has each video worked on once, by this process or another one; see the top of this module.

    Args:
        videos: name to path, as from [`find_videos`].
        output: the folder that all processes share; made if it doesn't exist.
        work: takes a video's path and a folder that doesn't exist yet, makes the folder with the results in it, and
            returns what is to be noted in the manifest. It raises ValueError for a video that can't be worked on.
            Any other exception ends this process's part; the video is then free for others.
        settings: what results depend on besides the video. Results made with other settings are not added to.

    Yields:
        for each of `videos`, when it is finished by whomever, its line of the manifest: `{"name", "video", "status":
        "done" or "failed", "error": str or None}` and what `work` returned. What an earlier run has done comes too; if
        it failed, or the video has changed since, it is worked on again.

    Raises:
        ValueError: if `output` holds results made with other settings, or something else in a video's place.
    """
    archive = _Archive(Path(output), videos)
    for name in videos:
        if archive.folder(name).exists() and not (archive.folder(name) / "video.json").exists():
            raise ValueError(f"output {str(archive.folder(name))!r} exists already, but is no result of this command")
    archive.check_settings(settings)
    archive.begin()
    lines, waiting, written = {}, list(videos), time.monotonic()
    try:
        while waiting:
            still_waiting = []
            for name in waiting:
                line = archive.finished(name)
                if line is not None:
                    archive.forget(name)  # the claims of who was killed when all else was done
                else:
                    line = archive.try_to_work(name, work)
                if line is None:  # another process is at it; should it die, a later round takes over
                    still_waiting.append(name)
                    continue
                lines[name] = line
                yield line
                if time.monotonic() > written + MANIFEST_EVERY:
                    archive.write_manifest(lines)
                    written = time.monotonic()
            if len(still_waiting) == len(waiting):
                time.sleep(min(1.0, LEASE / 4))
            waiting = still_waiting
    finally:
        archive.write_manifest(archive.lines_there() | lines)


@dataclass
class _Claim:
    name: str
    number: int
    path: Path


class _Archive:
    """The files in the output folder."""

    def __init__(self, output: Path, videos: dict[str, str]):
        self.output, self.videos = output, videos
        self.hidden = output / ".ausm"

    def folder(self, name: str) -> Path:
        return self.output / name

    def _failure(self, name: str) -> Path:
        return self.hidden / "failed" / f"{name}.json"

    def check_settings(self, settings: dict):
        path = self.hidden / "settings.json"
        if not path.exists():
            self._write(path, settings)
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(settings))
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"output {str(self.output)!r} holds results made with {key} {found.get(key)!r}, not "
                    f"{wanted.get(key)!r}; wanted are the same settings, or another folder"
                )

    def finished(self, name: str) -> dict | None:
        """The video's line of the manifest, if it is done or has failed."""
        with suppress(FileNotFoundError, NotADirectoryError):
            line = json.loads((self.folder(name) / "video.json").read_text(encoding="utf-8"))
            if line.pop("version", None) == self._version(name):
                return line
        with suppress(FileNotFoundError):
            failed = json.loads(self._failure(name).read_text(encoding="utf-8"))
            if failed["version"] == self._version(name) and self._failure(name).stat().st_mtime > self.began:
                return failed["line"]
        return None

    def _version(self, name: str) -> list:
        """Tells whether a video has changed."""
        with suppress(OSError):
            path = self.videos[name]
            files = image_files(Path(path)) if os.path.isdir(path) else [path]
            stats = [os.stat(file) for file in files]
            return [sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)]
        return []

    def try_to_work(self, name: str, work: Callable[[str, Path], dict]) -> dict | None:
        """Claims the video and works on it; None if another process has it."""
        claim = self._claim(name)
        if claim is None:
            return None
        line = self.finished(name)  # perhaps in the moment before
        if line is not None:
            self.forget(name)
            return line
        *dead_places, place = (self.hidden / "work" / f"{name}.{number}.work" for number in range(claim.number + 1))
        for dead in dead_places:
            shutil.rmtree(dead, ignore_errors=True)
        line = {"name": name, "video": self.videos[name], "status": "done", "error": None}
        version = self._version(name)  # of what is read: should it change meanwhile, the next run sees it
        kept = False
        try:
            with _kept_alive(claim):
                try:
                    line |= work(self.videos[name], place)
                except ValueError as error:
                    line |= {"status": "failed", "error": " ".join(str(error).split())}
                if line["status"] == "done":
                    self._write(place / "video.json", line | {"version": version})
                    self.folder(name).parent.mkdir(parents=True, exist_ok=True)
                    if not self._lost(claim):
                        old = self.hidden / f"{uuid.uuid4().hex}.old"
                        with suppress(FileNotFoundError):  # results of an earlier version of the video
                            os.rename(self.folder(name), old)
                        os.rename(place, self.folder(name))
                        shutil.rmtree(old, ignore_errors=True)
                        self._failure(name).unlink(missing_ok=True)
                        kept = True
                elif not self._lost(claim):
                    self._write(self._failure(name), {"version": version, "line": line})
                    kept = True
        except OSError:
            if not self._lost(claim):
                raise
            # Who took over has removed what this process was writing.
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if not kept and self.finished(name) is None:
                with suppress(OSError):
                    os.utime(claim.path, (0, 0))  # dead: free for others. Removed, two could make the same claim.
            else:
                self.forget(name)
        return line if kept else self.finished(name)

    def _claim(self, name: str) -> _Claim | None:
        newest = self._newest_claim(name)
        if newest >= 0 and not self._is_dead(self._claim_path(name, newest)):
            return None
        path = self._claim_path(name, newest + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump({"machine": socket.gethostname(), "place": _place(), "process": os.getpid()}, file)
        except FileExistsError:
            return None
        return _Claim(name, newest + 1, path)

    def _claim_path(self, name: str, number: int) -> Path:
        return self.hidden / "claims" / f"{name}.{number}.claim"

    def _newest_claim(self, name: str) -> int:
        """Its number; -1 if there is none."""
        number = 0
        while self._claim_path(name, number).exists():
            number += 1
        return number - 1

    def _is_dead(self, path: Path) -> bool:
        try:
            touched = path.stat().st_mtime
            owner = json.loads(path.read_text(encoding="utf-8") or "{}")  # empty in the moment of its making
        except FileNotFoundError:
            return False  # no claim any more: the video has just been finished
        if owner.get("place") == _place() is not None and not _is_running(owner["process"]):
            return True
        return self._now() > touched + LEASE

    def _now(self) -> float:
        """The time by the file server's clock."""
        with tempfile.TemporaryFile(dir=self.hidden) as file:
            return os.fstat(file.fileno()).st_mtime

    def _lost(self, claim: _Claim) -> bool:
        """Whether another process, which thought this one dead, has the video now."""
        return self._claim_path(claim.name, claim.number + 1).exists() or not claim.path.exists()

    def forget(self, name: str):
        """Removes the claims of a finished video, the newest first: who dies halfway leaves none that is not found."""
        for number in reversed(range(self._newest_claim(name) + 1)):
            self._claim_path(name, number).unlink(missing_ok=True)

    def begin(self):
        """Notes the time, and removes what processes were writing when they were killed."""
        self.began = self._now()
        latest = self.began - LEASE  # it takes no one so long to write a file
        for partial in self.hidden.glob("*.partial"):
            with suppress(FileNotFoundError):
                if partial.stat().st_mtime < latest:
                    partial.unlink()
        for old in self.hidden.glob("*.old"):
            shutil.rmtree(old, ignore_errors=True)

    def lines_there(self) -> dict[str, dict]:
        """The lines of all that is in the output folder: two runs may write the manifest in the same moment."""
        lines = {}
        for path in [*self.output.rglob("video.json"), *(self.hidden / "failed").rglob("*.json")]:
            with suppress(OSError, ValueError, KeyError, TypeError):  # some other file of this name
                line = json.loads(path.read_text(encoding="utf-8"))
                line = line.get("line", line)
                if path in (self.folder(line["name"]) / "video.json", self._failure(line["name"])):
                    lines[line["name"]] = {key: value for key, value in line.items() if key != "version"}
        return lines

    def write_manifest(self, lines: dict[str, dict]):
        """Adds `lines` to the manifest. Those of videos that are no longer there stay."""
        path = self.output / "manifest.jsonl"
        with suppress(FileNotFoundError):
            old = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            lines = {line["name"]: line for line in old} | lines
        if lines:
            self._write(path, *(lines[name] for name in sorted(lines)))

    def _write(self, path: Path, *lines: dict):
        """Writes a file whole or not at all."""
        partial = self.hidden / f"{uuid.uuid4().hex}.partial"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _kept_alive(claim: _Claim):
    """Touches the claim every now and then while the block runs."""
    ended = threading.Event()

    def touch():
        while not ended.wait(LEASE / 6):
            with suppress(OSError):  # taken over
                os.utime(claim.path)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _place() -> str | None:
    """Names the running system within which process ids mean something: host names repeat among containers."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    return None


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


__all__ = ["are_many", "find_videos", "work_through"]
