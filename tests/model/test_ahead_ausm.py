"""The next frame is encoded ahead: when, in which thread, and what fails."""

import threading
from types import SimpleNamespace

import pytest
import torch

from ausm_hf.model.ahead_ausm import encode_ahead


def on_cpu():
    return SimpleNamespace(device=torch.device("cpu"))


def test_the_next_frame_is_encoded_while_one_goes_through_the_rest(five_threads):
    """Each of the two waits for the other: one after the other they would never end."""
    encoding = [threading.Event() for _ in range(4)]
    stepping = [threading.Event() for _ in range(4)]
    used = []

    def encode(frame):
        encoding[frame].set()
        assert frame == 0 or stepping[frame - 1].wait(20)
        used.append(("encode", torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return 10 * frame

    def step(frame, encoded):
        stepping[frame].set()
        assert frame == 3 or encoding[frame + 1].wait(20)
        used.append(("step", torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return frame, encoded

    for number, result in enumerate(encode_ahead(on_cpu(), range(4), encode, step, live=False)):
        assert result == (number, 10 * number) and torch.get_num_threads() == 5
    assert number == 3 and sorted(set(used)) == [("encode", 2, False), ("step", 3, True)] and len(used) == 8


@pytest.mark.parametrize("live", [False, True])
def test_nothing_encoded_ahead_keeps_what_gradients_need(five_threads, live):
    weight = torch.ones(1, requires_grad=True)
    steps = encode_ahead(on_cpu(), range(2), lambda frame: weight * frame, lambda frame, encoded: encoded, live)
    assert [encoded.requires_grad for encoded in steps] == [False, False]


@pytest.mark.parametrize("threads, live, read", [(1, False, [0, 1]), (5, False, [0, 1, 2]), (5, True, [0, 1])])
def test_no_more_than_one_frame_is_read_ahead(five_threads, threads, live, read):
    torch.set_num_threads(threads)
    seen = []

    def frames():
        for frame in range(9):
            seen.append(frame)
            yield frame

    results = encode_ahead(on_cpu(), frames(), lambda frame: frame, lambda frame, encoded: encoded, live)
    assert seen == [] and [next(results), next(results)] == [0, 1]
    results.close()
    assert seen == read and torch.get_num_threads() == threads


@pytest.mark.parametrize("part", ["frames", "encode", "step"])
@pytest.mark.parametrize("threads", [1, 5])
def test_what_fails_at_a_frame_fails_at_its_turn(five_threads, threads, part):
    torch.set_num_threads(threads)

    def check(here, frame):
        if here == part and frame == 2:
            raise ValueError(f"{part} fails")
        return frame

    frames = (check("frames", frame) for frame in range(9))
    results = encode_ahead(
        on_cpu(), frames, lambda frame: check("encode", frame), lambda frame, encoded: check("step", frame), live=False
    )
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match=f"{part} fails"):
        next(results)
    assert torch.get_num_threads() == threads
