"""The command `ausm`. Each command is one call into the library, which is imported only when the command runs."""

import argparse
import sys


def segment(args: argparse.Namespace):
    from tqdm import tqdm

    from .segment import check_formats, load_model, read_mask, save_segments, segment_video
    from .video import read_video

    formats = check_formats(args.formats.split(","))
    source = read_video(args.input)
    masks = None if args.masks is None else read_mask(args.masks)
    model, processor = load_model(args.model, args.device, args.dtype)
    results = segment_video(source, model, processor, masks, args.threshold)
    results = tqdm(results, total=source.num_frames, unit="frame", desc=source.name)
    for path in save_segments(results, args.output, formats, source.fps, source.name):
        print(path)


def init(args: argparse.Namespace):
    from .checkpoint import write_checkpoint

    print(write_checkpoint(args.folder, args.preset, args.mask2former))


def train(args: argparse.Namespace):
    from .training import load_recipe, train

    print(train(load_recipe(args.recipe, args.overrides)))


def evaluate(args: argparse.Namespace):
    from .evaluation.benchmarks import evaluate
    from .evaluation.report import format_results

    results = evaluate(**{key: value for key, value in vars(args).items() if key != "function"})
    if results is not None:
        print(format_results(results))


def _auto_or_number(text: str) -> str | int:
    return text if text == "auto" else int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ausm", description="Autoregressive universal video segmentation.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=description, description=description)
        added.set_defaults(function=function)
        return added

    added = command(segment, "Follow what is marked in a video's first frame, or find, name and follow everything.")
    added.add_argument("input", metavar="INPUT", help="video file, folder of frames, glob pattern, URL or camera:0")
    added.add_argument("--model", metavar="ID_OR_PATH", help="checkpoint (default: the ausm-nano of the package)")
    added.add_argument("--masks", metavar="FIRST_FRAME.png", help="indexed image: pixel = object id, 0 = background")
    added.add_argument("--threshold", type=float, help="foreground probability of an object (default: the model's)")
    added.add_argument("--output", metavar="DIR", default="ausm-output", help="where to write (default: %(default)s)")
    added.add_argument("--formats", default="mp4,png,json", help="which files to write (default: %(default)s)")
    added.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes an accelerator if any")
    added.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")

    added = command(init, "Write a checkpoint to start from, with the code that loads it.")
    added.add_argument("folder", metavar="DIR", help="folder to make")
    added.add_argument("--preset", default="nano", help="nano (trained), tiny or base (the paper's sizes)")
    added.add_argument("--from", dest="mask2former", metavar="ID_OR_PATH", help="Mask2Former that gives the weights")

    added = command(train, "Train by a recipe; goes on where an earlier run of it stopped.")
    added.add_argument("recipe", metavar="RECIPE", help="YAML file")
    added.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="in place of what the recipe says")

    added = command(evaluate, "Run a benchmark with the paper's settings, and score it as its official tools do.")
    added.add_argument(
        "--benchmark",
        required=True,
        help="davis2016, davis2017, youtube_vos_2018, youtube_vos_2019, mose, sa_v, youtube_vis_2019, "
        "youtube_vis_2021, ovis or coco",
    )
    added.add_argument("--root", metavar="DIR", required=True, help="the data set in its official layout")
    added.add_argument("--split", default="val", help="which part of it (default: %(default)s)")
    added.add_argument("--mode", help="prompted or unprompted (default: the benchmark's)")
    added.add_argument("--model", metavar="ID_OR_PATH", help="checkpoint (default: the ausm-nano of the package)")
    added.add_argument("--output", metavar="DIR", help="where to write (default: under ausm-evaluation)")
    added.add_argument("--passes", type=int, default=1, help="play forward, backward, forward: 1 to 3 of them")
    added.add_argument("--traversal", action="store_true", help="images: four views of 90%% between two full ones")
    added.add_argument(
        "--top-k", type=_auto_or_number, default="auto", help="objects reported per frame (default: as the paper)"
    )
    added.add_argument("--threshold", type=float, help="foreground probability of an object (default: the model's)")
    added.add_argument("--resume", action="store_true", help="go on where an earlier run into the output stopped")
    added.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes an accelerator if any")
    added.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    return parser


def main(arguments: list[str] | None = None):
    """Runs the command line. What the user can mend becomes one line on stderr and exit code 2."""
    try:
        args = build_parser().parse_args(arguments)
        args.function(args)
    except (ValueError, OSError) as error:
        print(f"ausm: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
