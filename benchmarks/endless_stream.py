"""
Does a stream slow down or grow with its age? `python benchmarks/endless_stream.py [--frames 10000]`

One stream of small synthetic frames (64 x 96 pixels, so that it ends in minutes; nothing in a stream's bookkeeping
depends on their size). Eight objects are followed at a time; every 10th frame the oldest is removed and a new one is
prompted, with an id that nobody has had: 1,000 in 10,000 frames, far more than there are slots.

Beside the old stream, frame by frame in turn, runs a young one that starts anew where the last 1,000 frames begin: a
machine that gets busier or slower meanwhile doesn't count as age. Printed are the processor time of a frame (median,
one thread) in the first and in the last 1,000 frames and in those of the young stream, and what the process holds in
memory after 1,000 frames and before the last 1,000.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
from common import machine, memory

from ausm_hf import load_model

SIZE = (64, 96)  # of the frames, and of what the network sees
SPAN = 1000  # frames that are compared
ALIVE, EVERY = 8, 10  # objects at a time; frames from one change to the next


def frame(index: int) -> np.ndarray:
    """A textured ground on which squares of all colours move."""
    rng = np.random.default_rng(index % 50)
    image = rng.integers(0, 120, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    for cell in range(ALIVE):
        image[square(cell, index)] = 30 * cell, 255 - 30 * cell, 128
    return image


def square(cell: int, index: int) -> tuple[slice, slice]:
    """Where the square of a cell is: eight cells in two rows, each with a square that swings to and fro."""
    top, left = cell // 4 * 32 + 6, cell % 4 * 24 + 2 + abs(index % 12 - 6)
    return slice(top, top + 16), slice(left, left + 14)


def state_bytes(session) -> int:
    """Of what is remembered, but for who is followed now, and where: bystanders come and go."""
    of_now = ("slots", "taken", "masks")
    return sum(x.numel() * x.element_size() for name, x in session.history.tensors().items() if name not in of_now)


class Stream:
    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.session = processor.init_video_session(seed=0, find_new_objects=False)
        self.index = 0
        self.times: list[float] = []

    def step(self) -> None:
        start = time.process_time()
        if self.index % EVERY == 0:
            if self.session.get_obj_num() == ALIVE:
                self.session.remove_object(self.session.obj_ids[0])
            object_id = self.index // EVERY + 1
            mask = np.zeros(SIZE, bool)
            mask[square(object_id % ALIVE, self.index)] = True
            self.processor.add_inputs_to_inference_session(
                self.session, None, object_id, input_masks=mask, original_size=SIZE
            )
        pixel_values = self.processor(images=frame(self.index), size={"height": SIZE[0], "width": SIZE[1]})
        output = self.model(inference_session=self.session, frame=pixel_values["pixel_values"])
        self.processor.post_process_instance_segmentation(output, target_sizes=[SIZE])
        self.times.append(time.process_time() - start)
        self.index += 1


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    args = parser.parse_args(arguments)
    span = min(SPAN, args.frames // 3)
    torch.set_num_threads(1)
    model, processor = load_model(args.model, device="cpu")
    old = Stream(model, processor)
    mib = {}
    while old.index < args.frames - span:
        old.step()
        if old.index == span:
            mib["mib_after_first"], bytes_after_first = round(memory(), 1), state_bytes(old.session)
    mib["mib_before_last"] = round(memory(), 1)  # the young stream would count as well
    young = Stream(model, processor)
    for _ in range(span):
        old.step()
        young.step()
    warm = ALIVE * EVERY  # until all objects are there
    first, last, of_young = (
        1000 * statistics.median(times)
        for times in (old.times[warm:span], old.times[-span + warm :], young.times[warm:])
    )
    result = {
        "frames": old.index,
        "objects": old.session.next_object_id - 1,
        "ms_first": round(first, 2),
        "ms_last": round(last, 2),
        "ms_young": round(of_young, 2),
        "last_to_first": round(last / first, 3),
        "old_to_young": round(last / of_young, 3),
        **mib,
        "history_bytes_unchanged": state_bytes(old.session) == bytes_after_first,
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
