"""
A visitor's file to frames. It may be anything, so it is decoded in a process of its own that can use only so much
memory and time, by the one demuxer that its first bytes ask for, and by decoders of a short list.

    python -m ausm_hf.demo.unpack FILE FOLDER LIMITS

writes `FOLDER/00000.jpg`, ..., then `FOLDER/clip.json`, and at last `FOLDER/sound.mp4` if there is sound that can be
read within the limits; or a sentence on stderr that says why not (exit code 3).
"""

import json
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image


class Refused(ValueError):
    """What a visitor is told: a sentence that names no file and no folder of the server."""


@dataclass(frozen=True)
class Limits:
    """What a visitor may bring. The sides are in pixels; `aspect` is the longer side by the shorter one."""

    megabytes: int = 100
    num_frames: int = 900
    seconds: float = 60
    min_side: int = 32
    max_side: int = 1920
    aspect: float = 4
    decoder_megabytes: int = 2048  # of memory
    decoder_seconds: int = 60  # of computing

    def __str__(self) -> str:
        return (
            f"up to {self.megabytes} MB, {self.seconds:g} seconds, {self.num_frames} frames and "
            f"{self.max_side} pixels a side"
        )

    def check_size(self, width: int, height: int):
        """Raises Refused for pictures that are too large, too small or too narrow."""
        short, long = sorted((width, height))
        if long > self.max_side or short < self.min_side or long > self.aspect * short:
            raise Refused(
                f"The picture is {width} x {height} pixels; wanted are {self.min_side} to {self.max_side} pixels a "
                f"side, one side at most {self.aspect:g} times the other."
            )

    def check_length(self, num_frames: int, seconds: float):
        """Raises Refused for a video that is too long."""
        if num_frames > self.num_frames or seconds > self.seconds:
            raise Refused(
                f"The video is too long: wanted are at most {self.num_frames} frames and {self.seconds:g} seconds."
            )


# FFmpeg's demuxers. Others read playlists, lists of files and images, or addresses; these read only the file itself.
# GIFs are read, but not asked for: programs can send them, and Gradio's page takes no file of that type.
DEMUXERS = {"mov": "MP4 or MOV", "matroska": "WebM or MKV", "avi": "AVI", "gif": ""}
PLAYED = ("h264", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9")  # by browsers, in MP4, MOV, WebM or MKV
SOUND_DECODERS = ("aac", "mp3", "mp3float", "opus", "libopus", "vorbis", "ac3", "pcm_s16le", "pcm_s16be", "pcm_u8")
DECODERS = ("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg", "gif")


def demuxer_of(path: str | os.PathLike) -> str:
    """Which of DEMUXERS a file is for, by its first bytes. Raises Refused if it is for none."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    if head[:4] == b"GIF8":
        return "gif"
    raise Refused(f"This is no video that can be read here; wanted is {', '.join(filter(None, DEMUXERS.values()))}.")


def unpack(path: str | os.PathLike, folder: Path, limits: Limits):
    """Writes the frames of a video and what is known of them. Raises Refused."""
    import av

    from ..decoding import ANY_METADATA, BadFrame, frames_in_order
    from ..model.upright_ausm import upright

    options = {
        "protocol_whitelist": "file",
        "codec_whitelist": ",".join(DECODERS),
        "max_pixels": str(limits.max_side**2),  # of a picture that the decoder makes room for
    }
    times: list[float | None] = []
    try:
        demuxer = demuxer_of(path)
        with av.open(os.path.abspath(path), format=demuxer, options=options, **ANY_METADATA) as container:
            if not container.streams.video:
                raise Refused("There are no pictures in this file.")
            stream = container.streams.video[0]
            codec = stream.codec_context
            if codec is not None and not codec.width:  # FFmpeg has not gone as far as a picture
                raise Refused("This video is broken, or its pictures are too large to be decoded here.")
            aspect = stream.sample_aspect_ratio or Fraction(1)
            if codec is not None:
                limits.check_size(codec.width, codec.height)
                limits.check_size(*shown_size(codec.width, codec.height, aspect))
            if codec is None or codec.name not in DECODERS:
                raise Refused("The pictures are coded in a way that can't be read here; wanted is H.264, VP9 or AV1.")
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0
            limits.check_length(stream.frames, seconds)
            codec.thread_count = 1
            fps = stream.average_rate or stream.guessed_rate
            tracks = [track.codec_context for track in container.streams.audio[:1]]
            has_sound = any(track is not None and track.name in SOUND_DECODERS for track in tracks)
            start, size = None, None
            for frame in frames_in_order(container, stream):
                if isinstance(frame, BadFrame):
                    continue
                limits.check_size(frame.width, frame.height)  # it can change on the way
                start = frame.time if start is None else start
                time = None if frame.time is None or start is None else frame.time - start
                limits.check_length(len(times) + 1, time or 0)
                picture = upright(frame)
                if size is None:
                    size = picture.shape[:2]
                    aspect = 1 / aspect if round(frame.rotation / 90) % 2 else aspect
                if picture.shape[:2] != size:
                    raise Refused("The pictures change their size on the way; wanted is one size for all.")
                with _room_on_the_disk():
                    _save(Image.fromarray(picture), folder / f"{len(times):05d}.jpg")
                times.append(time)
    except (av.FFmpegError, OSError, MemoryError) as error:
        # A file that is cut short still shows what it has.
        if not times:
            raise Refused("This video is broken, or none: its pictures can't be decoded.") from error
    if not times:
        raise Refused("There are no pictures in this file.")
    known_times = [time for time in times if time is not None]
    in_order = known_times == times == sorted(known_times)
    clip = {"size": size, "fps": float(fps) if fps else None, "num_frames": len(times), "pixel_aspect": str(aspect)}
    clip["plays"] = demuxer in ("mov", "matroska") and codec.name in PLAYED
    with _room_on_the_disk():
        partial = folder / "clip.partial"
        partial.write_text(json.dumps({**clip, "times": times if in_order else None}), encoding="utf-8")
        os.replace(partial, folder / "clip.json")
    if has_sound:
        options |= {"codec_whitelist": ",".join(DECODERS + SOUND_DECODERS)}
        seconds = (times[-1] or 0) + 1 / float(fps or 24)
        with suppress(av.FFmpegError, OSError, ValueError, MemoryError):  # what can't be heard can be seen
            _unpack_sound(path, folder / "sound.mp4", seconds, format=demuxer, options=options)


def _unpack_sound(path: str | os.PathLike, to: Path, seconds: float, **how):
    """Writes the sound of a file from its first picture on, AAC in MP4, whole or not at all."""
    import av

    from ..sound import SoundCopy

    partial = to.with_name(f"partial-{to.name}")
    with av.open(str(partial), "w") as container:
        copy = SoundCopy(path, container, **how)
        copy.copy(seconds)
        copy.finish()
        copy.close()
    os.replace(partial, to)


def shown_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height in square pixels of a picture whose pixels are none: one of them is smaller."""
    one = Fraction(1)
    return max(1, round(width * min(one, pixel_aspect))), max(1, round(height / max(one, pixel_aspect)))


@contextmanager
def _room_on_the_disk():
    try:
        yield
    except OSError as error:
        raise Refused("There is no room left for this video. Please try again in an hour.") from error


def _save(image: Image.Image, path: Path):
    """Whole or not at all: who waits for the first frame must not see half of it."""
    partial = path.with_suffix(".partial")
    image.save(partial, "jpeg", quality=95, subsampling=0)
    os.replace(partial, path)


def main():
    path, folder, limits = sys.argv[1], Path(sys.argv[2]), Limits(**json.loads(sys.argv[3]))
    try:
        import resource
    except ImportError:  # not on Windows: there the caller's clock is all that stops it
        pass
    else:
        of_all = {
            resource.RLIMIT_AS: limits.decoder_megabytes * 2**20,
            resource.RLIMIT_CPU: limits.decoder_seconds,
            resource.RLIMIT_CORE: 0,
        }
        for what, limit in of_all.items():
            with suppress(ValueError, OSError):  # macOS refuses to bound the memory
                resource.setrlimit(what, (limit, limit))
    try:
        unpack(path, folder, limits)
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(3)


def arguments(path: str | os.PathLike, folder: Path, limits: Limits) -> list[str]:
    """The command that runs this module."""
    return [sys.executable, "-m", __name__, str(path), str(folder), json.dumps(asdict(limits))]


if __name__ == "__main__":
    main()
