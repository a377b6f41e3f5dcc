"""
Time of the streaming step, and of the whole way from video file to video file: `python benchmarks/step.py`.

A synthetic 426 x 240 video with 1, 8 and 20 marked objects

- goes through `segment_video` and `save_segments` as in `ausm segment` (decode, segment, overlay, encode): frames per
  second;
- goes through the same calls one after another, each timed by itself: per stage the median over the frames. The
  network is two stages, the frame encoder and the history with all that comes after it; `segment_video` does the first
  three stages of the next frame while it does the others, with half of the threads each. The floor
  of the network is its floating point operations (torch's counter) over the rate at which this machine multiplies
  matrices, measured in the same run;
- in three rounds over the numbers of objects, as the machine's speed drifts;
- and is profiled: the ten operations of the step that take the most time.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, matmul_rate, print_table, write_results
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ausm_hf import VideoWriter, load_model, read_video, segment_video
from ausm_hf.model.pipeline_ausm import start_session
from ausm_hf.segment import save_segments
from ausm_hf.visualization import draw_overlay, object_labels

SIZE = (240, 426)
STAGES = ["decode", "preprocess", "frame encoder", "history", "session", "post-process", "overlay", "encode"]
WARM_UP = 5
ROUNDS = 3


def object_masks(count: int) -> np.ndarray:
    """Up to 20 squares in four rows: uint8, pixel = object id."""
    masks = np.zeros(SIZE, np.uint8)
    for index in range(count):
        row, column = divmod(index, 5)
        masks[10 + 56 * row : 50 + 56 * row, 15 + 82 * column : 70 + 82 * column] = index + 1
    return masks


def write_video(path: Path, frames: int):
    """Twenty coloured squares, trembling, over noise that drifts."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 160, (SIZE[0] // 6, SIZE[1] // 6 + 40, 3), np.uint8).repeat(6, axis=0).repeat(6, axis=1)
    colors = rng.integers(100, 256, (21, 3), np.uint8)
    masks = object_masks(20)
    with VideoWriter(path, 24, SIZE) as writer:
        for index in range(frames):
            frame = ground[: SIZE[0], index : index + SIZE[1]].copy()
            moved = np.roll(masks, int(6 * np.sin(index / 5)), axis=1)
            frame[moved > 0] = colors[moved[moved > 0]]
            writer.write(frame)


def run(video: Path, folder: Path, model, processor, count: int) -> dict[str, list[float]]:
    """Milliseconds of each stage, frame by frame."""
    source = read_video(video)
    session = start_session(processor, source.size, object_masks(count))
    times: dict[str, list[float]] = {stage: [] for stage in STAGES}
    in_history = []
    network_step = model.step

    def timed_step(*args, **kwargs):
        start = time.perf_counter()
        output = network_step(*args, **kwargs)
        in_history.append(time.perf_counter() - start)
        return output

    def encode(pixel_values):
        with torch.inference_mode():
            return model.encode_frames(pixel_values)

    frames = iter(source)
    model.step = timed_step
    try:
        with VideoWriter(folder / "overlay.mp4", source.fps, SIZE) as writer:
            while True:
                clock = [time.perf_counter()]
                frame = next(frames, None)
                if frame is None:
                    break
                clock.append(time.perf_counter())
                pixel_values = processor(images=frame)["pixel_values"]
                clock.append(time.perf_counter())
                features = encode(pixel_values)
                clock.append(time.perf_counter())
                output = model(inference_session=session, frame=features)
                clock.append(time.perf_counter())
                result = processor.post_process_instance_segmentation(output, target_sizes=[SIZE])[0]
                masks = result["segmentation"].numpy()
                clock.append(time.perf_counter())
                drawn = draw_overlay(frame, masks, object_labels(result["segments_info"]))
                clock.append(time.perf_counter())
                writer.write(drawn)
                clock.append(time.perf_counter())
                before, step, after = np.split(np.diff(clock), [3, 4])
                row = [*before, in_history[-1], *(step - in_history[-1]), *after]
                for stage, seconds in zip(STAGES, row):
                    times[stage].append(1000 * seconds)
    finally:
        del model.step
    return {stage: values[WARM_UP:] for stage, values in times.items()}


def frames_per_second(video: Path, folder: Path, model, processor, count: int) -> float:
    """Of decoding, segmenting, drawing and encoding, after the first frames."""
    clock = []

    def timed(results):
        for result in results:
            clock.append(time.perf_counter())
            yield result

    results = segment_video(video, model, processor, masks=object_masks(count))
    save_segments(timed(results), folder / "out", ["mp4"], fps=24)
    return (len(clock) - 1 - WARM_UP) / (time.perf_counter() - clock[WARM_UP])


def in_mid_stream(model, processor, count: int):
    """A frame, and the history before it."""
    session = start_session(processor, SIZE, object_masks(count))
    pixel_values = processor(images=np.zeros((*SIZE, 3), np.uint8))["pixel_values"]
    model(inference_session=session, frame=pixel_values)
    return pixel_values, session.history


def step_flops(model, processor, count: int) -> int:
    """Floating point operations of one step."""
    pixel_values, history = in_mid_stream(model, processor, count)
    # Written out, attention is matrix products, which the counter knows on every device.
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.step(pixel_values, history)
    model.set_attn_implementation(before)
    return counter.get_total_flops()


def dearest_operations(model, processor, count: int, steps: int = 10) -> list[dict]:
    """The ten operations, by name and shapes, in which the step spends the most time of the processor."""
    pixel_values, history = in_mid_stream(model, processor, count)
    with torch.inference_mode():
        model.step(pixel_values, history)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(steps):
                model.step(pixel_values, history)
    found = profiler.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in found)
    rows = sorted(found, key=lambda event: -event.self_cpu_time_total)[:10]
    return [
        {
            "operation": event.key.removeprefix("aten::"),
            "shapes": " ".join("x".join(map(str, shape)) for shape in event.input_shapes if shape)[:60],
            "calls": event.count // steps,
            "ms": event.self_cpu_time_total / 1e3 / steps,
            "share": event.self_cpu_time_total / total,
        }
        for event in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint (default: the ausm-nano of the package)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=40, help=f"of the video; {WARM_UP} are not counted")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 8, 20], help="how many are marked, at most 20")
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    if args.frames <= WARM_UP + 1 or not all(1 <= count <= 20 for count in args.objects):
        parser.error(f"more than {WARM_UP + 1} frames and 1 to 20 objects are wanted")

    torch.set_num_threads(args.threads)
    model, processor = load_model(args.model, "cpu", "float32")
    model.requires_grad_(False)  # the counter of operations would look for gradients
    rate = matmul_rate()
    rounds: dict[int, list[dict]] = {count: [] for count in args.objects}
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "video.mp4"
        write_video(video, args.frames)
        for _ in range(ROUNDS):
            for count, done in rounds.items():
                stages = run(video, Path(folder), model, processor, count)
                done.append({**stages, "fps": frames_per_second(video, Path(folder), model, processor, count)})
    rows = []
    for count, done in rounds.items():
        medians = {stage: statistics.median(ms for times in done for ms in times[stage]) for stage in STAGES}
        rows.append(
            {
                "objects": count,
                **medians,
                "one after another": sum(medians.values()),
                "network floor": 1e3 * step_flops(model, processor, count) / rate,
                "frames per second": statistics.median(times["fps"] for times in done),
            }
        )
    operations = dearest_operations(model, processor, args.objects[0])

    print(f"{machine()}\n{rate / 1e9:.0f} GFLOP/s in matrix products; milliseconds per frame\n")
    print_table(rows, rows[0])
    print("the step's dearest operations\n")
    print_table(operations, operations[0])
    write_results("step", rows, args.output, frame_size=SIZE, matmul_gflops=rate / 1e9, operations=operations)


if __name__ == "__main__":
    main()
