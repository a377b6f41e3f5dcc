"""What FFmpeg makes of a video file or stream."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
from av.container import InputContainer

# Titles and the like come in any encoding. From version 19 on PyAV takes them as they are, and has no such argument.
ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
LONGEST_DELAY = 64  # packets after which a decoder has given the frame of a packet, if it ever does


@dataclass
class BadFrame:
    """Stands where a frame would be that can't be decoded."""

    reason: str
    is_end: bool = False  # nothing after it can be read either


def open_container(location: Any, name: str, **options) -> InputContainer:
    """What FFmpeg reads a file or stream from. Raises ValueError if it can't."""
    try:
        return av.open(location, **ANY_METADATA, **options)
    except (av.FFmpegError, OSError) as error:
        # `from None`: the original names the whole URL, with the password that may be in it.
        raise ValueError(f"video {name!r} can't be opened: {error.strerror or 'unknown reason'}") from None


def frames_in_order(
    container: InputContainer, stream: av.VideoStream, left: list[BadFrame] | None = None
) -> Iterator[av.VideoFrame | BadFrame]:
    """
    Frames as they are shown, with a `BadFrame` in the place of each that is damaged. A decoder gives frames in this
    order, but says late that one is damaged, and holds others back: which one is missing, time stamps tell.

    Args:
        left: takes those that are damaged among the last ones. A decoder with threads may lose the others there too,
            and one without doesn't.
    """
    waiting: list[int] = []  # time stamps of packets whose frames haven't come, the first one first
    errors: list[BadFrame] = []  # of packets whose place isn't known yet

    def lost(stop: int | None) -> Iterator[BadFrame]:
        while waiting and (stop is None or waiting[0] < stop):
            heapq.heappop(waiting)
            if errors:  # others were never to be shown
                yield errors.pop(0)

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            yield from lost(None)
            yield BadFrame(error.strerror or str(error), is_end=True)
            return
        if packet is None:
            if left is None:
                yield from lost(None)
            elif waiting:
                left.extend(errors)
            return
        if packet.pts is not None:
            heapq.heappush(waiting, packet.pts)
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            frames = []
            errors.append(BadFrame(error.strerror or str(error)))
        for frame in frames:
            if frame.pts is not None:
                yield from lost(frame.pts)
                if waiting and waiting[0] == frame.pts:
                    heapq.heappop(waiting)
            yield frame
        if packet.pts is None and packet.size:  # there are no time stamps
            yield from iter(errors)
            errors.clear()
        if len(waiting) > LONGEST_DELAY:
            yield from lost(waiting[0] + 1)
