"""The sound of a video file, copied beside pictures that were made of it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer, OutputContainer

from .decoding import BadFrame, frames_in_order, open_container

RATE = 48_000  # samples per second
SLACK = RATE // 100  # samples that time stamps may be wrong by


class SoundCopy:
    """The first sound track of a file, piece by piece into another as AAC, which every browser plays.

    Times are seconds since the first picture of the file that can be decoded: what is heard before it is left out, and
    there is silence where the track has nothing, or nothing that can be decoded. Where its clock goes back, as where
    recordings were joined, it goes on as if it hadn't. A warning tells of a track that can't be copied.

    Args:
        path: the file; it is read as far as the copy goes.
        container: where to write; nothing may have been written to it yet.
        options: how FFmpeg is to open the file, see `av.open`.

    Raises:
        ValueError: if the file can't be opened.
    """

    def __init__(self, path: str | os.PathLike, container: OutputContainer, **options):
        self._name, self._container = Path(path).name, container
        with open_container(os.path.abspath(path), self._name, **options) as pictures:
            self._start = _first_shown(pictures)
        self._source = open_container(os.path.abspath(path), self._name, **options)
        self._end = 0  # the sample up to which it is copied
        self._held = np.zeros((1, 0), np.float32)
        self._pieces: Iterator[np.ndarray] = iter(())
        tracks = self._source.streams.audio
        if tracks and tracks[0].codec_context is None:
            self._leave_out("its codec is unknown")
        elif tracks:
            self._layout = "mono" if tracks[0].channels == 1 else "stereo"
            self._stream = container.add_stream("aac", rate=RATE, layout=self._layout)
            self._pieces = self._from_first_picture(tracks[0])

    def copy(self, until: float) -> None:
        """Goes on to the time `until`, or to the end of the track."""
        stop = round(until * RATE)
        while self._end < stop:
            if not self._held.size:
                try:
                    self._held = next(self._pieces, self._held)
                except (av.FFmpegError, ValueError) as error:
                    self._leave_out(str(error))
                if not self._held.size:
                    return
            piece, self._held = np.split(self._held, [stop - self._end], axis=1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts = RATE, self._end
            self._end += frame.samples
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Writes what the encoder holds back."""
        if self._end > 0:
            self._container.mux(self._stream.encode(None))

    def close(self) -> None:
        self._source.close()

    def _from_first_picture(self, track: av.AudioStream) -> Iterator[np.ndarray]:
        """Samples without a gap, float32 (channels, number): where some come late there is silence before them."""
        start, end = self._start, 0
        for frame in self._resampled(track):
            piece = np.nan_to_num(frame.to_ndarray()).clip(-1, 1)  # the encoder refuses what is no number, or huge
            begin = end if frame.time is None else round((frame.time - start) * RATE)
            if begin < end - RATE and end > 0:
                start += (begin - end) / RATE
                begin = end
            if begin < end - SLACK:
                piece = piece[:, end - begin :]
            while begin > end + SLACK:
                silence = np.zeros((len(piece), min(RATE, begin - end)), np.float32)
                end += silence.shape[1]
                yield silence
            if piece.size:
                end += piece.shape[1]
                yield piece

    def _leave_out(self, reason: str):
        self._pieces = iter(())
        warnings.warn(f"the sound of {self._name!r} is left out: {reason}", stacklevel=4)

    def _resampled(self, track: av.AudioStream) -> Iterator[av.AudioFrame]:
        # Broadcasts change the kind of their sound on the way, and a resampler is for one kind.
        for _, frames in groupby(
            _decoded(self._source, track), lambda x: (x.sample_rate, x.format.name, x.layout.name)
        ):
            resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=RATE)
            for frame in frames:
                yield from resampler.resample(frame)


def _first_shown(container: InputContainer) -> float:
    """Seconds on the clock of a file at which its first picture is shown; 0 without any."""
    # AVI has no clock but the number of the picture.
    if not container.streams.video or container.format.name == "avi":
        return 0.0
    frames = frames_in_order(container, container.streams.video[0])
    return next((frame.time or 0.0 for frame in frames if not isinstance(frame, BadFrame)), 0.0)


def _decoded(source: InputContainer, track: av.AudioStream) -> Iterator[av.AudioFrame]:
    """The frames of a track, without those that are damaged, as far as the file can be read."""
    packets = source.demux(track)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError):
            return
        if packet is None:
            return
        with suppress(av.FFmpegError):
            yield from packet.decode()
