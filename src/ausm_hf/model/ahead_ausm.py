"""On a CPU the next frame of a video is encoded while this one is segmented."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

Frame = TypeVar("Frame")
Encoded = TypeVar("Encoded")
Result = TypeVar("Result")


def encode_ahead(
    model,
    frames: Iterable[Frame],
    encode: Callable[[Frame], Encoded],
    step: Callable[[Frame, Encoded], Result],
    live: bool,
) -> Iterator[Result]:
    """
    `step(frame, encode(frame))` for each frame of a video in turn. What the network sees in a frame alone needs no
    history: on a CPU the next frame is read and encoded in a second thread meanwhile, both with half of torch's
    threads, which makes better use of them than all of them in one half of the network after the other.

    Args:
        model ([`AusmForUniversalSegmentation`]): The network.
        frames (iterable): The frames.
        encode (`Callable`): What can be done with a frame before its turn, in inference mode; no two at the same time.
        step (`Callable`): All the rest, in this thread.
        live (`bool`): Whether frames may still have to be made, as a camera's: none is read before its turn.

    Yields:
        What `step` returns. What `frames` or `encode` raise comes when the frame's turn has come.
    """
    encode = torch.inference_mode()(encode)
    threads = torch.get_num_threads()
    if live or model.device.type != "cpu" or threads < 2:
        for frame in frames:
            yield step(frame, encode(frame))
        return
    coming = iter(frames)

    def encode_next() -> list[tuple[Frame, Encoded]]:
        return [(frame, encode(frame)) for frame in islice(coming, 1)]

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads // 2,)) as second_thread:
        encoded = second_thread.submit(encode_next)
        while frame_with_features := encoded.result():
            encoded = second_thread.submit(encode_next)
            with _torch_threads(threads - threads // 2):
                result = step(*frame_with_features[0])
            yield result


@contextmanager
def _torch_threads(number: int):
    """So many threads for what torch computes in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
