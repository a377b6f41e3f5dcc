"""Videos with sound of which it is known when it is heard: tones of half a second."""

from fractions import Fraction

import av
import numpy as np

from ausm_hf.video import VideoWriter, read_video

RATE = 44_100
FPS = 25


def tones(seconds, rate=RATE, channels=1):
    """Half a second of a tone, half a second of silence, and so on: float32 (channels, samples) in -1..1."""
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time) * (time % 1 < 0.5)
    return np.repeat(tone.astype(np.float32)[None], channels, 0)


def film(path, seconds=3.0, sound_at=0.0, codec="aac", rate=RATE, channels=1, begins=0.0, sounds=None, bf=0, gop=250):
    """A video whose clock begins at `begins`, with `sounds` (second -> samples): tones from `sound_at` on."""
    layout = {1: "mono", 2: "stereo", 6: "5.1", 9: "9 channels"}[channels]
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=FPS)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        pictures.options = {"bf": str(bf), "g": str(gop)}
        track = container.add_stream(codec, rate=rate, layout=layout)
        for index in range(round(seconds * FPS)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), index % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index + round(begins * FPS), Fraction(1, FPS)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        for second, samples in (sounds or {sound_at: tones(seconds, rate, channels)}).items():
            for start in range(0, samples.shape[1], 1024):
                piece = np.ascontiguousarray(samples[:, start : start + 1024].T).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(piece, format="flt", layout=layout)
                frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
                frame.pts = round((second + begins) * rate) + start
                container.mux(track.encode(frame))
        container.mux(track.encode())
    return path


def copied(path, out):
    """The video written anew, with its sound."""
    source = read_video(path)
    with VideoWriter(out, source.fps, source.size, sound=source.sound) as writer:
        for time, frame in source.with_times():
            writer.write(frame, time)
    return out


def heard(path):
    """The sound of a file from its first picture on: (samples per second, samples of the first channel)."""
    with av.open(str(path)) as container:
        begins = next(container.decode(video=0)).time
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    rate = frames[0].sample_rate
    to_float = av.AudioResampler("fltp")
    samples = np.zeros(round((frames[-1].time - begins + 1) * rate))
    for frame in frames:
        at = round((frame.time - begins) * rate)
        piece = to_float.resample(frame)[0].to_ndarray()[0][max(0, -at) :]
        samples[max(0, at) : max(0, at) + len(piece)] = piece
    return rate, samples


def tones_in(path):
    """When the tones of a file are heard: [[start, end], ...] in seconds."""
    rate, samples = heard(path)
    loud = np.flatnonzero(np.abs(samples) > 0.05) / rate
    pauses = np.flatnonzero(np.diff(loud) > 0.1)
    return [[start, end] for start, end in zip(loud[[0, *(pauses + 1)]], loud[[*pauses, -1]])]
