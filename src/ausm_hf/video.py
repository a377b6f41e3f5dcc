"""Frames in and frames out, one at a time: files, folders of frames, cameras, streams, stdin, iterables; MP4 writing.

A frame is everywhere a numpy uint8 RGB array of shape (height, width, 3). Nothing here holds more of a video in memory
than the frame at hand and what the decoder looks ahead; only [`VideoSource.backward`] holds a piece of it.
"""

import glob
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from fractions import Fraction
from io import BufferedReader
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar, cast

import av
import numpy as np
from PIL import Image, ImageOps

from .decoding import BadFrame, frames_in_order, open_container
from .files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, WholeOrNothing, image_files, natural_order, visible
from .model.upright_ausm import upright
from .sound import SoundCopy

STREAM_SCHEMES = tuple(f"{x}://" for x in ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps", "srt", "tcp", "udp"))
FPS_WHEN_UNKNOWN = 24
HELD_BYTES = 256 * 2**20  # of frames, for reading backwards

Result = TypeVar("Result")


CHANNELS = (1, 3, 4)


def as_rgb_frame(frame) -> np.ndarray:
    """Turns one image of any common kind into a frame.

    Args:
        frame: one of
            - a `PIL.Image` of any 8-bit mode;
            - a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4);
            - a torch tensor (H, W), (1, H, W), (3, H, W) or (4, H, W), on any device;
            - either with its channels at the other end, where the numbers leave no doubt.
            Arrays and tensors are uint8 in 0..255 or floating point in 0..1. Grey is repeated over the three channels.
            A fourth channel is alpha and is dropped: what lies behind a see-through pixel is not known.

    Returns:
        uint8 RGB array (H, W, 3), contiguous. It may share memory with `frame`.

    Raises:
        ValueError: for any other type, shape, dtype or range, and for an image without pixels.
    """
    if isinstance(frame, Image.Image):
        if frame.mode[0] in "IF":
            raise ValueError(f"frame is a PIL image of mode {frame.mode!r}; wanted are 8 bits per channel")
        array = np.asarray(ImageOps.exif_transpose(frame).convert("RGB"))  # as a photograph is shown
    elif _is_tensor(frame):
        tensor = frame.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        array = tensor.numpy()
        if array.ndim == 3 and array.shape[0] in CHANNELS:
            array = array.transpose(1, 2, 0)
    elif isinstance(frame, np.ndarray):
        array = frame
        if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
            array = array.transpose(1, 2, 0)
    else:
        raise ValueError(f"frame is a {type(frame).__name__}; wanted is a PIL image, a numpy array or a torch tensor")

    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in CHANNELS:
        raise ValueError(
            f"frame has shape {tuple(frame.shape)}; wanted is (height, width), with or without 1, 3 or 4 channels"
        )
    if array.size == 0:
        raise ValueError(f"frame has shape {array.shape}: it has no pixels")

    array = array[:, :, :3]
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # the slack is for rounding; NaN fails too
            raise ValueError(f"frame is floating point and spans {low:g} to {high:g}; wanted is 0 to 1")
        array = (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"frame has dtype {array.dtype}; wanted is uint8 in 0..255 or floating point in 0..1")
    if array.shape[2] == 1:
        array = array.repeat(3, axis=2)
    return np.ascontiguousarray(array)


class VideoSource:
    """A video to be read frame by frame: iterate over it. Made by [`read_video`].

    The first frame is decoded when the source is made, so that a broken video is found out before any work starts.
    Files and folders can be iterated over again; cameras, streams, stdin and one-shot iterators only once.

    Attributes:
        name (`str`): file stem, folder name, `"camera0"`, `"stdin"`, last part of a URL, or `"frames"`.
        fps (`Fraction` or `None`): average frames per second; `None` where nobody knows (images, raw frames).
        size (`tuple[int, int]`): (height, width) of every frame, in pixels, after rotation.
        pixel_aspect (`Fraction`): width by height of a pixel as it is meant to be shown, after rotation; mostly 1.
        num_frames (`int` or `None`): how many frames the source says it has: exact for images and lists, what the
            file's header says for videos (good for a progress bar), `None` where nobody knows.
        num_skipped (`int`): how many frames, up to now, could not be decoded and were left out.
        once (`bool`): whether it can be read only once.
        sound (`str` or `None`): path of the file that its sound is in; `None` without any, and for what can be read
            only once.
    """

    def __init__(
        self,
        name: str,
        open_frames: Callable[[int], Iterator[tuple[float | None, object]]],  # from the frame of this index on
        fps: Fraction | None = None,
        num_frames: int | None = None,
        once: bool = False,
        strict: bool = False,
        live: bool = False,  # a frame may be long in coming
    ):
        self.name, self.fps, self.num_frames, self.once = name, fps, num_frames, once
        self.num_skipped = 0
        self._live, self._stopped = live, False
        self._come: SimpleQueue = SimpleQueue()  # what `_awaited` waits for
        self.pixel_aspect = Fraction(1)
        self.sound: str | None = None
        self._open_frames, self._strict = open_frames, strict
        self._last_bad = (-1, "")  # what was reported last: reading again doesn't report it again
        opened = self._good_frames(0)
        first = next(opened, None)
        if first is None:
            reason = f" that can be decoded: {self._last_bad[1]}" if self.num_skipped else ""
            raise ValueError(f"video {name!r} has no frames{reason}")
        self.size = first[2].shape[:2]
        self._opened: tuple | None = (first, opened)  # goes to whoever reads first

    def __iter__(self) -> Iterator[np.ndarray]:
        for _, _, frame in self.read():
            yield frame

    def with_times(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Iterates over (time, frame); see `read`."""
        for _, time, frame in self.read():
            yield time, frame

    def read(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, float | None, np.ndarray]]:
        """Iterates over (index, time, frame).

        - index: 0, 1, 2, ...; a frame that can't be decoded is reported by a warning and its index left out.
        - time: seconds since the video's first frame, `None` where the source has no clock. Where the clock doesn't
          go on, as where recordings were joined, a frame comes one usual distance after the one before.

        Args:
            first: index of the first frame to read.
            stop: index of the frame to stop before; the end of the video by default.

        Raises:
            ValueError: naming the frame, when it is of another size than the first one, or it can't be decoded and
                the source is strict.
        """
        if self._opened is not None and (first == 0 or self.once):
            item, opened = self._opened
            self._opened = None
        elif self.once:
            raise ValueError(f"video {self.name!r} can be read only once")
        else:
            item, opened = None, self._good_frames(first)
        while (item := item or next(opened, None)) is not None:
            index, _, frame = item
            if stop is not None and index >= stop:
                return
            if frame.shape[:2] != self.size:
                (height, width), (new_height, new_width) = self.size, frame.shape[:2]
                raise ValueError(
                    f"frame {index} of {self.name!r} is {new_width} x {new_height} pixels (width x height), "
                    f"the frames before it {width} x {height}; all frames must be of one size"
                )
            if index >= first:
                yield item
            item = None
            del frame  # keep only one frame alive

    def backward(self, last: int) -> Iterator[tuple[int, float | None, np.ndarray]]:
        """Iterates over (index, time, frame) from frame `last` back to the first.

        A video can be decoded only forwards, so it is read several times, a piece of at most 256 MB of frames at a
        time, from its end to its beginning: memory is bounded, whatever the length. (Of a short clip, one piece
        is all.)

        Raises:
            ValueError: for a source that can be read only once, and as `read`.
        """
        if self.once:
            raise ValueError(f"video {self.name!r} can be read only once, so not backwards")
        held = max(1, HELD_BYTES // (3 * self.size[0] * self.size[1]))
        while last >= 0:
            first = max(0, last + 1 - held)
            piece = list(self.read(first, last + 1))
            while piece:
                yield piece.pop()
            last = first - 1

    def stop(self) -> None:
        """Ends a camera, a stream or standard input after the frame at hand; none is waited for any longer.

        It can be called at any time, from a signal handler or another thread too.
        """
        self._stopped = True
        self._come.put((None, None))

    def _awaited_frames(self, first: int) -> Iterator[tuple[float | None, object]]:
        frames = self._open_frames(first)
        while not self._stopped and (item := _awaited(lambda: next(frames, None), self._come)) is not None:
            yield item

    def _good_frames(self, first: int) -> Iterator[tuple[int, float | None, np.ndarray]]:
        frames = self._awaited_frames(first) if self._live else self._open_frames(first)
        for index, (time, frame) in enumerate(frames, first):
            if not isinstance(frame, BadFrame):
                try:
                    yield index, time, as_rgb_frame(frame)
                except ValueError as error:
                    raise ValueError(f"frame {index} of {self.name!r}: {error}") from None
                continue
            which = "from frame {} on {!r} can't be read" if frame.is_end else "frame {} of {!r} can't be decoded"
            message = f"{which.format(index, self.name)}: {frame.reason}"
            if self._strict:
                raise ValueError(message)
            if index > self._last_bad[0]:
                self._last_bad = (index, message)
                self.num_skipped += 1
                warnings.warn(message, stacklevel=2)


def read_video(source, strict: bool = False, raw_size: tuple[int, int] | None = None) -> VideoSource:
    """Opens anything that shows frames one after another.

    Args:
        source: one of
            - a path: a video file, an image file (a video of one frame, or of those of an animated WebP or PNG), or a
              folder of frames (jpg, png, webp, bmp, in natural order of their names: `2.png` before `10.png`);
            - a glob pattern of images, or of one video, as `"shots/*_left.png"`;
            - `"camera:0"`: the camera at `/dev/video0` (Linux);
            - the URL of a network stream: `http`, `https`, `rtsp`, `rtmp`, `srt`, `tcp` or `udp`;
            - `"-"`: standard input: JPEG images one after another (MJPEG), or what else FFmpeg can read from a pipe
              (MPEG-TS, Matroska), or raw frames if `raw_size` is given;
            - a list of paths of images, in the order of the frames;
            - an iterable of frames, each as [`as_rgb_frame`] takes them; so also arrays (T, H, W, 3) and tensors
              (T, 3, H, W);
            - one image (`PIL.Image`, array or tensor of two or three dimensions): a video of one frame;
            - a `VideoSource`, which is returned as it is.
            How a phone was held (rotation of videos, EXIF orientation of photographs) is undone.
        strict: a frame that can't be decoded is an error. By default it is reported by a warning and left out; a
            stream that breaks off has then ended.
        raw_size: (height, width) of raw frames on standard input: bytes R, G, B of each pixel, row by row, frame by
            frame, with nothing between them.

    Returns:
        [`VideoSource`]: an iterable of uint8 RGB arrays (H, W, 3).

    Raises:
        ValueError: if nothing is there, or it has no frame that can be decoded. Later, while iterating, if a frame
            changes its size, or can't be decoded and `strict`.
    """
    if raw_size is not None and (len(raw_size) != 2 or min(raw_size) < 1):
        raise ValueError(f"raw_size is {raw_size}; wanted is (height, width), both positive")
    if raw_size is not None and not (isinstance(source, str) and source == "-"):
        raise ValueError("raw_size is given; it is for raw frames on standard input, source '-'")
    if isinstance(source, VideoSource):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _read_stdin(strict, raw_size) if source == "-" else _read_location(os.fspath(source), strict)
    if isinstance(source, Image.Image) or ((_is_tensor(source) or isinstance(source, np.ndarray)) and source.ndim < 4):
        source = [source]
    if isinstance(source, (list, tuple)) and source and all(isinstance(p, (str, os.PathLike)) for p in source):
        paths = [Path(p) for p in source]
        if no_images := [p for p in paths if p.suffix.lower() not in IMAGE_SUFFIXES]:
            raise ValueError(
                f"source lists {str(no_images[0])!r}, which is no image; wanted are the frames of one video, and "
                "several videos one by one"
            )
        return _read_images("frames", paths, strict)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, dict, io.IOBase)):
        return VideoSource(
            "frames",
            lambda first: ((None, frame) for frame in islice(source, first, None)),
            num_frames=len(source) if isinstance(source, Sized) else None,
            once=isinstance(source, Iterator),
        )
    raise ValueError(f"source is a {type(source).__name__}; wanted is a path, URL, 'camera:0' or iterable of frames")


def _read_location(location: str, strict: bool) -> VideoSource:
    if not location:
        raise ValueError("source is empty; wanted is a path, URL, camera:0 or -")
    if location.startswith("camera:"):
        device = f"/dev/video{location.removeprefix('camera:')}"
        if not os.path.exists(device):
            why = (
                ""
                if sys.platform == "linux"
                else "; cameras are read on Linux only, elsewhere through a URL or a pipe"
            )
            raise ValueError(f"source {location!r}: there is no camera at {device}{why}")
        return _read_container(device, location.replace(":", ""), strict, live=True, format="v4l2")
    if location.startswith(STREAM_SCHEMES):
        # A URL may carry a password or a token, so only its last part is ever shown.
        name = location.split("?")[0].rstrip("/").split("/")[-1].split("@")[-1]
        return _read_container(location, name, strict, live=True, timeout=(10, 30))

    path = Path(location)
    if path.is_dir():
        try:
            images = image_files(path)
        except OSError as error:
            raise ValueError(f"folder {location!r} can't be read: {error.strerror}") from error
        if not images:
            videos = sorted({p.suffix for p in visible(path) if p.suffix.lower() in VIDEO_SUFFIXES})
            hint = f"; videos in it are named by a pattern, such as '{path.name}/*{videos[0]}'" if videos else ""
            raise ValueError(f"folder {location!r} has no images ({', '.join(IMAGE_SUFFIXES)}){hint}")
        return _read_images(path.resolve().name, images, strict)
    if path.is_file():
        return _read_file(path, strict)
    if is_pattern(location):
        paths = [Path(p) for p in glob.glob(location, recursive=True) if os.path.isfile(p)]
        if not paths:
            raise ValueError(f"pattern {location!r} matches no file")
        if len(paths) == 1:
            return _read_file(paths[0], strict)
        for p in paths:
            if p.suffix.lower() not in IMAGE_SUFFIXES:
                raise ValueError(
                    f"pattern {location!r} matches {len(paths)} files and {p.name!r} is no image; "
                    "wanted are images (the frames of one video) or one video"
                )
        return _read_images(paths[0].resolve().parent.name, sorted(paths, key=natural_order), strict)
    raise ValueError(f"source {location!r}: no such file or folder")


def is_pattern(location: str) -> bool:
    """Whether it is a glob pattern rather than the name of something that exists."""
    is_stream = location.startswith((*STREAM_SCHEMES, "camera:"))
    return any(letter in location for letter in "*?[") and not is_stream and not os.path.exists(location)


def _read_file(path: Path, strict: bool) -> VideoSource:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with suppress(OSError, SyntaxError, Image.DecompressionBombError), Image.open(path) as image:
            if getattr(image, "is_animated", False):
                return _read_animation(path, image.n_frames, strict)
        return _read_images(path.stem, [path], strict)
    # An absolute path is never taken for a protocol by FFmpeg, whatever the file is called.
    return _read_container(os.path.abspath(path), path.stem, strict)


def _read_animation(path: Path, num_frames: int, strict: bool) -> VideoSource:
    def frames(first):
        time = 0.0
        with Image.open(path) as image:
            for index in range(num_frames):
                try:
                    image.seek(index)
                    image.load()
                except (OSError, SyntaxError, EOFError) as error:
                    yield None, BadFrame(f"{path.name!r}, frame {index}: {error}")
                    return
                if index >= first:
                    yield time, image.convert("RGB")
                time += image.info.get("duration", 100) / 1000

    return VideoSource(path.stem, frames, num_frames=num_frames, strict=strict)


def _read_images(name: str, paths: list[Path], strict: bool) -> VideoSource:
    def frames(first):
        for path in paths[first:]:
            try:
                with Image.open(path) as image:
                    picture = ImageOps.exif_transpose(image)
                    picture.load()
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
                yield None, BadFrame(f"{path.name!r}: {error}")
            else:
                yield None, picture

    return VideoSource(name, frames, num_frames=len(paths), strict=strict)


def _awaited(function: Callable[[], Result], come: SimpleQueue) -> Result:
    """What a function returns that may take long. It runs in a thread of its own: meanwhile Ctrl-C is heard here."""

    def run():
        try:
            come.put((function(), None))
        except BaseException as error:
            come.put((None, error))

    Thread(target=run, daemon=True).start()  # a daemon: nobody waits for it when the program ends
    result, error = come.get()
    if error is not None:
        raise error
    return result


class _Stdin:
    """Standard input as PyAV takes it: what is there is handed on at once, so that no frame waits for later ones."""

    def __init__(self):
        self._file = cast(BufferedReader, sys.stdin.buffer)
        self.start = self._file.read1()  # and what Python may hold of it

    def read(self, num_bytes: int) -> bytes:
        data, self.start = self.start[:num_bytes], self.start[num_bytes:]
        # Not through Python's buffer: it would be locked while a thread waits, even when the program ends.
        return data or self._file.raw.read(num_bytes) or b""


def _read_stdin(strict: bool, raw_size: tuple[int, int] | None) -> VideoSource:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("source '-': standard input is no pipe or file")
    stdin = _Stdin()
    if raw_size is None:
        options = {}
        if stdin.start[:2] == b"\xff\xd8":
            # The first image says all; by default FFmpeg would wait for a hundred of them.
            options = {"format": "mjpeg", "options": {"probesize": "32", "fpsprobesize": "0"}}
        is_mp4 = stdin.start[4:8] == b"ftyp"
        try:
            return _read_container(stdin, "stdin", strict, live=True, has_clock=not options, **options)
        except ValueError as error:
            if not is_mp4:
                raise
            raise ValueError(
                f"{error}; an MP4 can come through a pipe only if its index comes first (ffmpeg's -movflags "
                "faststart); or give the file's name"
            ) from None

    def frames(first):
        num_bytes = 3 * raw_size[0] * raw_size[1]
        while True:
            data = bytearray()
            while len(data) < num_bytes and (more := stdin.read(num_bytes - len(data))):
                data += more
            if len(data) < num_bytes:
                if data:
                    yield None, BadFrame(f"it has {len(data)} bytes, wanted are {num_bytes}")
                return
            yield None, np.frombuffer(data, np.uint8).reshape(*raw_size, 3)

    return VideoSource("stdin", frames, once=True, strict=strict, live=True)


def _read_container(
    location: str | _Stdin, name: str, strict: bool, live: bool = False, has_clock: bool = True, **options
) -> VideoSource:
    """A video that FFmpeg reads. `live`: no second reading, and no frames held back by the decoder's threads."""

    def open_stream(in_threads: bool = not live):
        container = open_container(location, name, **options)
        if not container.streams.video:
            container.close()
            raise ValueError(f"video {name!r} can't be opened: there are no pictures in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # of no known codec; before version 18 PyAV crashes if it is asked to decode
            container.close()
            raise ValueError(f"video {name!r} has no frames that can be decoded: its codec is unknown")
        stream.thread_type = "AUTO" if in_threads else "SLICE"
        return container, stream

    def frames(first):
        left: list[BadFrame] = []
        now_open = opened.pop() if opened else open_stream()
        index = yield from decoded(first, *now_open, left=None if live else left)
        if (index < num_frames or left) and not live:
            # Where a file was cut off, the decoder's threads lose the frames before the end; one alone doesn't.
            index = yield from decoded(max(first, index), *open_stream(in_threads=False))
        if index < num_frames:
            # Not an error: a video trimmed without coding it anew hides frames that its header still counts.
            message = f"video {name!r} should have {num_frames} frames, {index} could be read; it may be cut short"
            warnings.warn(message, stacklevel=2)

    def decoded(first, container, stream, left=None):
        """The frames from `first` on; returns how many there are with those before it."""
        index, start, last, clock = 0, 0.0, None, has_clock
        step = float(1 / (fps or FPS_WHEN_UNKNOWN))
        # AVI doesn't say when frames are shown. What FFmpeg guesses is wrong where they are coded in another order.
        guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
        with container:
            frame: Any
            for frame in frames_in_order(container, stream, left):
                time = None
                if isinstance(frame, BadFrame):
                    if frame.is_end:
                        yield None, frame
                        return num_frames
                elif clock:
                    shown = index * step if guessed else frame.time
                    if last is None:
                        start, time, clock = shown, 0.0, shown is not None
                    elif shown is None:  # of some frames a stream may not say when they are shown
                        time = last + step
                    else:
                        if shown - start <= last:  # recordings joined: the clock restarts
                            start = shown - last - step
                        time = shown - start
                    time = last = time if clock else None
                if index >= first:
                    if not isinstance(frame, BadFrame):
                        turned.add(round(frame.rotation / 90) % 2 == 1)
                        frame = upright(frame)
                    yield time, frame
                index += 1
        return index

    container, stream = _awaited(open_stream, SimpleQueue()) if live else open_stream()
    opened = [(container, stream)]  # for the first reading; later ones open the file anew
    aspect, has_sound = stream.sample_aspect_ratio or Fraction(1), bool(container.streams.audio)
    turned: set[bool] = set()  # whether frames are, by 90 degrees
    fps, num_frames = (stream.average_rate or stream.guessed_rate) if has_clock else None, stream.frames
    source = VideoSource(name, frames, fps or None, num_frames or None, once=live, strict=strict, live=live)
    source.pixel_aspect = 1 / aspect if True in turned else aspect
    if has_sound and not live:
        source.sound = str(location)
    return source


def _is_tensor(x) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported torch; nobody else should wait for it
    return torch is not None and isinstance(x, torch.Tensor)


class VideoWriter(WholeOrNothing):
    """Writes frames to a video file (H.264, yuv420p: what every browser plays), whole or not at all.

    Args:
        path: the file to write; its suffix names the container (`.mp4`, `.mkv`, `.mov`).
        fps: frames per second; `None` (images have no rate) stands for 24.
        size: (height, width) of the frames in pixels, up to 16384. H.264 wants even numbers: an odd last row or
            column is repeated.
        pixel_aspect: width by height of a pixel as it is to be shown.
        sound: a file, such as `source.sound`, the sound of which to copy for as long as there are frames.

    Raises:
        ValueError: for a suffix, rate or size that can't be, or a file of sound that can't be opened; on leaving the
            block, when no frame was written.

    ```python
    with VideoWriter("out.mp4", fps=source.fps, size=source.size, sound=source.sound) as writer:
        for frame in source:
            writer.write(frame)
    ```
    """

    # Time stamps of frames that bring their own time are counted in this unit, usual for video.
    _TICK = Fraction(1, 90_000)

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float | Fraction | None,
        size: tuple[int, int],
        pixel_aspect: Fraction = Fraction(1),
        sound: str | os.PathLike | None = None,
    ):
        super().__init__(path)
        if self.path.suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise ValueError(f"path {str(path)!r} ends in {self.path.suffix!r}; wanted is .mp4, .mkv or .mov")
        fps = FPS_WHEN_UNKNOWN if fps is None else fps
        if not 0.01 <= fps <= 100_000:  # NaN fails too
            raise ValueError(f"fps is {fps}; wanted is a number from 0.01 to 100000")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.size, self.pixel_aspect, self.sound = tuple(size), pixel_aspect, sound
        if len(self.size) != 2 or min(self.size) < 1 or max(self.size) > 16384:
            raise ValueError(f"size is {size}; wanted are (height, width), both from 1 to 16384")
        self._container: av.container.OutputContainer = None  # type: ignore[assignment]  # until `_start`
        self._sound: SoundCopy | None = None

    def _start(self):
        height, width = self.size
        self._container = av.open(str(self.partial.absolute()), "w", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream("libx264", rate=self.fps)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        # Without B-frames the times of a video of variable rate come out right, and its length with them.
        self._stream.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = 6  # SMPTE 170M, said so that no player guesses
        codec.color_range = 1  # limited
        codec.sample_aspect_ratio = self.pixel_aspect
        if self.sound is not None:
            self._sound = SoundCopy(self.sound, self._container)
        self._last_pts, self._last_step = -1, 0
        self._timed = None

    def write(self, frame: np.ndarray, time: float | None = None) -> None:
        """Appends a frame.

        Args:
            frame: uint8 RGB array (H, W, 3) of the writer's size.
            time: seconds since the first frame, for videos of variable rate; with every frame or with none. A time
                that doesn't go on from the one before is moved to just after it. The last frame is shown as long as
                the one before it.

        Raises:
            ValueError: for a frame of another size or dtype, or a time sometimes given and sometimes not.
        """
        self._check_open()
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape != (*self.size, 3):
            got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"frame is {got}; wanted is a uint8 array of shape {(*self.size, 3)}")
        if self._timed is None:
            self._timed = time is not None
            self._tick = self._TICK if self._timed else 1 / self.fps
            self._stream.codec_context.time_base = self._tick
        if self._timed != (time is not None):
            raise ValueError("time is given for some frames and not for others")

        height, width = self.size
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG", threads=1)
        picture.pts = max(self._last_pts + 1, 0 if time is None else round(time / self._tick))
        picture.time_base = self._tick
        self._last_step = picture.pts - max(self._last_pts, 0)
        self._last_pts = picture.pts
        self._container.mux(self._stream.encode(picture))
        if self._sound is not None:
            self._sound.copy(float(self._last_pts * self._tick))

    def _finish(self):
        if self._last_pts < 0:
            raise ValueError(f"no frame was written to {str(self.path)!r}")
        packets = self._stream.encode()
        if packets and self._timed and self._last_step:
            packets[-1].duration = self._last_step  # nobody has said; FFmpeg would go by the rate
        self._container.mux(packets)
        if self._sound is not None:
            self._sound.copy(float((self._last_pts + max(1, self._last_step)) * self._tick))
            self._sound.finish()
        self._container.close()

    def _release(self):
        if self._sound is not None:
            self._sound.close()
        if self._container is not None:
            with suppress(av.FFmpegError):  # nothing more to lose: an unfinished file is about to be removed
                self._container.close()
