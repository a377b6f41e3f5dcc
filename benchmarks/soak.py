"""
Streams under a careless user for a long time: `python benchmarks/soak.py --minutes 30`.

Three streams of different sizes get random frames, prompts of every kind, right and wrong ones, removals, previews,
steps one by one and together, frames of the wrong size; they are saved and resumed, and begun anew now and then. After
each command it is checked that what is wrong was refused with a ValueError and left the stream as it was, and that ids
were not used twice. Prints one JSON line; exit code 1 if memory grew. A failure prints the seed and the number of the
command: `--seed` repeats it.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter

import numpy as np
import torch
from common import memory

import ausm_hf

SIZES = [(60, 90), (96, 64), (64, 120)]  # of videos, height and width
GROWTH = 1.05  # memory in the last quarter, as a multiple of that in the second, that counts as flat


class Stream:
    """One video without end, and what its user does."""

    def __init__(self, model, processor, size: tuple[int, int], rng: random.Random):
        self.model, self.processor, self.size, self.rng = model, processor, size, rng
        self.begin()

    def begin(self):
        """A new stream."""
        self.session = self.processor.init_video_session(
            find_new_objects=self.rng.choice([None, True, False]),
            foreground_threshold=self.rng.choice([None, 0.05, 0.3]),
            seed=self.rng.randrange(2**31),
        )
        self.given: set[int] = set()  # ids that the user has used

    def frame(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        height, width = size or self.size
        frame = np.full((height, width, 3), self.rng.randrange(120), np.uint8)
        for _ in range(self.rng.randrange(4)):
            top, left = self.rng.randrange(height - 8), self.rng.randrange(width - 8)
            color = [self.rng.randrange(256) for _ in range(3)]
            frame[top : top + self.rng.randint(8, 40), left : left + self.rng.randint(8, 40)] = color
        return self.processor(images=frame)["pixel_values"]

    def step(self):
        self.seen(self.model(inference_session=self.session, frame=self.frame()))

    def seen(self, output):
        assert len(set(output.object_ids)) == len(output.object_ids)
        assert output.pred_masks.isfinite().all() and output.scores.isfinite().all()
        self.processor.post_process_instance_segmentation(output, target_sizes=[self.size])

    def frame_of_another_size(self):
        self.model(inference_session=self.session, frame=self.frame((200, 64)))

    def prompt(self):
        """Of any kind; one in five is nonsense."""
        height, width = self.size
        number = self.rng.randint(1, 2)
        ids = [self.rng.choice([self.session.next_object_id + i, *self.session.obj_ids]) for i in range(number)]

        def point():
            return [self.rng.uniform(-1, width), self.rng.uniform(-1, height)]

        kind = self.rng.choice(["masks", "boxes", "points", "scribbles", "nonsense"])
        inputs = {}
        if kind == "masks":
            inputs["input_masks"] = []
            for _ in ids:
                mask = np.zeros(self.size, np.uint8)
                top, left = self.rng.randrange(height), self.rng.randrange(width)
                mask[top : top + 20, left : left + 20] = 1
                inputs["input_masks"].append(mask)
        elif kind == "boxes":
            inputs["input_boxes"] = [[[*point(), *point()] for _ in ids]]
        elif kind == "points":
            points = [[point() for _ in range(self.rng.randint(1, 3))] for _ in ids]
            inputs["input_points"] = [points]
            inputs["input_labels"] = [[[self.rng.choice([1, 1, 0]) for _ in of_object] for of_object in points]]
        elif kind == "scribbles":
            inputs["input_scribbles"] = [[[point() for _ in range(3)] for _ in ids]]
        else:
            inputs = self.rng.choice(
                [{}, {"input_boxes": "box"}, {"input_points": [[[[None, 1]]]]}, {"obj_ids": "one"}]
            )
        frame_idx = self.rng.choice([None, None, self.session.next_frame_idx + self.rng.randint(-1, 3)])
        self.processor.add_inputs_to_inference_session(
            self.session, frame_idx, **({"obj_ids": ids, "original_size": self.size} | inputs)
        )
        self.given.update(ids)

    def remove(self):
        self.session.remove_object(self.rng.choice([*self.session.obj_ids, 10**6]))

    def preview(self):
        self.model.preview_prompts(self.session, self.frame())

    def save_and_resume(self, path: str):
        self.session.save(path)
        self.session = ausm_hf.AusmInferenceSession.load(path)


def run(minutes: float, seed: int) -> dict:
    rng = random.Random(seed)
    model, processor = ausm_hf.load_model(device="cpu")
    processor.image_processor.size = {"shortest_edge": 64}
    streams = [Stream(model, processor, size, rng) for size in SIZES]
    counts, refused, frames = Counter(), Counter(), 0
    start = time.monotonic()
    samples = []  # (seconds, MiB)
    with tempfile.TemporaryDirectory() as folder:
        while (elapsed := time.monotonic() - start) < 60 * minutes:
            stream = rng.choice(streams)
            name = rng.choices(
                [
                    "step",
                    "prompt",
                    "remove",
                    "preview",
                    "save_and_resume",
                    "frame_of_another_size",
                    "begin",
                    "together",
                ],
                [50, 15, 8, 5, 5, 3, 1, 5],
            )[0]
            counts[name] += 1
            before = stream.session.next_frame_idx, stream.session.obj_ids, stream.session.next_object_id
            try:
                if name == "save_and_resume":
                    stream.save_and_resume(f"{folder}/stream.safetensors")
                elif name == "together":
                    twin = Stream(model, processor, stream.size, rng)
                    outputs = model.step_sessions([stream.session, twin.session], [stream.frame(), twin.frame()])
                    stream.seen(outputs[0])
                    frames += 2
                else:
                    getattr(stream, name)()
                    frames += name == "step"
            except ValueError:
                refused[name] += 1
                after = stream.session.next_frame_idx, stream.session.obj_ids, stream.session.next_object_id
                assert before == after, f"seed {seed}, command {counts.total()}: {name} was refused and left a trace"
            except Exception as error:
                raise RuntimeError(f"seed {seed}, command {counts.total()}: {name}") from error
            ids = stream.session.obj_ids
            assert len(set(ids)) == len(ids)
            assert len(stream.session.objects) <= model.config.num_id_vectors
            if name not in ("begin", "prompt"):  # a new id is one that nobody has had
                assert all(i in before[1] or i >= before[2] or i in stream.given for i in ids)
            if not samples or elapsed > samples[-1][0] + 60 * minutes / 200:
                samples.append((elapsed, memory()))
    second = statistics.median(m for t, m in samples if 15 * minutes <= t < 30 * minutes)
    last = statistics.median(m for t, m in samples if t >= 45 * minutes)
    return {
        "minutes": minutes,
        "seed": seed,
        "frames": frames,
        "commands": dict(counts),
        "refused": dict(refused),
        "rss_mib": {
            "start": round(samples[0][1], 1),
            "second_quarter": round(second, 1),
            "last_quarter": round(last, 1),
            "end": round(memory(), 1),
        },
        "flat": last <= GROWTH * second,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams under random commands for a long time.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    result = run(**vars(parser.parse_args()))
    print(json.dumps(result))
    sys.exit(not result["flat"])


if __name__ == "__main__":
    main()
