"""
AUSM beside its peers on the same frames: `python benchmarks/peers.py`.

Synthetic videos of which N objects are marked in the first frame, each model by its own streaming calls, in float32,
without gradients, the first two frames not counted. Weights are random but for ausm-nano, whose time doesn't depend on
them either. Sizes are each model's own default and one equal for all. Each model and size has a process of its own, in
which the numbers of objects grow; the memory after many frames is measured in another one.

- `Sam2VideoModel` (tiny), `EdgeTamVideoModel`: masks through the session, as their documentation streams; scaled
  dot-product attention; no vision features cached but the current frame's. SAM 2 keeps every frame it is given,
  and its outputs, on the CPU, which is its default here too.
- `VideomtForUniversalSegmentation` finds objects itself and takes no number of them; one frame per call.
- Cutie (`rf-cutie`, with its `omegaconf`) as its evaluation runs it: short side of 480, memory every 5 frames.
- AUSM: `ausm-nano` and the preset `tiny` (Swin-T, random), through its session.

A model whose package is missing is left out, and said so. `--long` adds several objects at the default sizes and the
peak memory after 500 frames.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import machine, memory, plot_lines, print_table, write_results

# (height, width) by default; what the network is given, whatever the video's size
SIZES = {
    "ausm-nano": (320, 576),
    "ausm-tiny": (480, 864),
    "sam2-tiny": (1024, 1024),
    "edgetam": (1024, 1024),
    "videomt": (640, 640),
    "cutie": (480, 864),
}


def object_masks(count: int, size: tuple[int, int]) -> torch.Tensor:
    """`(N, H, W)` bool: a grid of rectangles."""
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for index in range(count):
        row, column = divmod(index, 5)
        top, left = size[0] * row // 4, size[1] * column // 5
        masks[index, top + 4 : top + size[0] // 4 - 4, left + 4 : left + size[1] // 5 - 4] = True
    return masks


def ausm(name: str, size, count: int):
    from ausm_hf import AusmConfig, AusmForUniversalSegmentation, load_model
    from ausm_hf.model.pipeline_ausm import start_session

    model, processor = load_model(device="cpu")
    if name == "ausm-tiny":
        model = AusmForUniversalSegmentation(AusmConfig.from_preset("tiny")).eval()
    labels = (object_masks(count, size) * torch.arange(1, count + 1)[:, None, None]).sum(0).to(torch.uint8).numpy()
    session = start_session(processor, size, labels)

    def step(frame):
        side = 32 * -(-size[0] // 32), 32 * -(-size[1] // 32)
        frame = torch.nn.functional.pad(frame, (0, side[1] - size[1], 0, side[0] - size[0]))
        return model(inference_session=session, frame=frame)

    return step


def sam2(name: str, size, count: int):
    import transformers

    made = {}
    if name == "sam2-tiny":
        config = transformers.Sam2VideoConfig()
        model_class = transformers.Sam2VideoModel
    else:
        config = transformers.EdgeTamVideoConfig()
        model_class = transformers.EdgeTamVideoModel
    if size != SIZES[name]:
        # Both want square frames, and sizes that follow from them.
        side = size[0]
        config.image_size = side
        config.vision_config.image_size = side
        config.vision_config.backbone_feature_sizes = [[side // k, side // k] for k in (4, 8, 16)]
        if hasattr(config.vision_config, "backbone_config"):
            config.vision_config.backbone_config.image_size = [side, side]
        config.prompt_encoder_config.image_size = side
        config.memory_attention_rope_feat_sizes = [side // 16, side // 16]
    model = model_class(config).eval()
    session_class = getattr(sys.modules[model_class.__module__], model_class.__name__[:-5] + "InferenceSession")
    session = session_class(video_height=size[0], video_width=size[1], dtype=torch.float32)
    made["masks"] = object_masks(count, size)

    def step(frame):
        if made:
            for index, mask in enumerate(made.pop("masks")):
                number = session.obj_id_to_idx(index + 1)
                session.add_mask_inputs(number, 0, mask[None, None].float())
                session.obj_with_new_inputs.append(index + 1)
        return model(inference_session=session, frame=frame[0])

    return step


def videomt(name: str, size, count: int):
    from transformers import VideomtConfig, VideomtForUniversalSegmentation

    model = VideomtForUniversalSegmentation(VideomtConfig(image_size=size[0])).eval()
    return lambda frame: model(pixel_values_videos=frame[None])


def cutie(name: str, size, count: int):
    from cutie.inference.inference_core import InferenceCore
    from cutie.model.cutie import CUTIE
    from cutie.model.utils import resnet
    from omegaconf import OmegaConf, open_dict

    import_path = Path(sys.modules["cutie.model.cutie"].__file__).parents[1] / "config"
    config = OmegaConf.merge(
        OmegaConf.load(import_path / "eval_config.yaml"),
        {"model": OmegaConf.load(import_path / "model" / "base.yaml")},
    )
    with open_dict(config):
        config.mem_every, config.use_long_term = 5, False
    # Random weights: its constructor would fetch ImageNet's.
    resnet.model_zoo.load_url = lambda *args, **kwargs: {}
    resnet.load_weights_add_extra_dim = lambda *args, **kwargs: None
    core = InferenceCore(CUTIE(config).eval(), config)
    masks = [object_masks(count, size).float()]

    def step(frame):
        if masks:
            return core.step(frame[0], masks.pop(), list(range(1, count + 1)), idx_mask=False)
        return core.step(frame[0])

    return step


MAKERS = {
    "ausm-nano": ausm,
    "ausm-tiny": ausm,
    "sam2-tiny": sam2,
    "edgetam": sam2,
    "videomt": videomt,
    "cutie": cutie,
}


def measure(name: str, size, counts: list[int], lengths: list[int], least: float) -> list[dict]:
    """A stream for each number of objects; see `stream`."""
    with torch.inference_mode():
        return [row for count in counts for row in stream(name, tuple(size), count, lengths, least)]


def stream(name: str, size, count: int, lengths: list[int], least: float) -> list[dict]:
    """Rows of when a stream has reached each of `lengths`, in frames, and run for `least` seconds or 20 frames."""
    torch.manual_seed(0)
    step, times, rows = MAKERS[name](name, size, count), [], []
    for length in lengths:
        while len(times) < length or (sum(times) < least and len(times) < 20):
            frame = torch.randn(1, 3, *size)
            start = time.perf_counter()
            step(frame)
            times.append(time.perf_counter() - start)
        row = {"model": name, "height": size[0], "width": size[1], "objects": count, "frames": len(times)}
        rows.append(row | {"ms per frame": 1e3 * statistics.median(times[2:] or times), "peak MiB": memory("peak")})
    return rows


def apart(limit: float, name: str, size, counts: list[int], lengths: list[int], least: float) -> list[dict]:
    """`measure` in a process of its own; what went wrong otherwise."""
    work = json.dumps([name, size, counts, lengths, least])
    try:
        done = subprocess.run([sys.executable, __file__, "--one", work], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        problem = f"took more than {limit:.0f} s"
    else:
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1])
        problem = done.stderr.strip().splitlines()[-1][:150]
    return [
        {"model": name, "height": size[0], "width": size[1], "objects": count, "not measured": problem}
        for count in counts
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--frames", type=int, default=3, help="at least, for times (default: %(default)s)")
    parser.add_argument("--equal-size", type=int, default=256, help="both sides (default: %(default)s)")
    parser.add_argument("--memory-frames", type=int, nargs="*", default=[10, 100], help="at the equal size, 1 object")
    parser.add_argument(
        "--long", action="store_true", help="also several objects at the default sizes, and memory after 500 frames"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="folder of the results (default: beside this file)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*json.loads(args.one))))
        return
    equal, rows, lines = (args.equal_size, args.equal_size), [], {}
    for name in args.models:
        counts = args.objects if name != "videomt" else args.objects[:1]
        # Five objects at 1024 x 1024 take SAM 2 eighteen seconds a frame on two cores.
        default_counts = counts if args.long else counts[:1]
        rows += apart(args.limit * len(counts), name, SIZES[name], default_counts, [args.frames], 3)
        timed = apart(args.limit, name, equal, counts, [args.frames], 3)
        rows += timed
        # Where a frame takes seconds, a hundred of them are for `--long`.
        lengths = args.memory_frames[:1] if name in ("ausm-tiny", "videomt") and not args.long else args.memory_frames
        if lengths := lengths + [500] * args.long:
            rows += apart(args.limit * max(1, lengths[-1] // 50), name, equal, [1], lengths, 0)
        if all("ms per frame" in row for row in timed):
            lines[name] = [row["objects"] for row in timed], [row["ms per frame"] for row in timed]
        print(name, "done", file=sys.stderr, flush=True)
    print(f"{machine()}\n")
    columns = ["model", "height", "width", "objects", "frames", "ms per frame", "peak MiB", "not measured"]
    print_table(rows, columns)
    write_results("peers", rows, args.output)
    if lines:
        plot_lines("peers", lines, "objects", f"ms per frame of {equal[0]} x {equal[1]}", args.output)


if __name__ == "__main__":
    main()
