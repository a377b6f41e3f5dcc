"""`make train-smoke`: the three stages of the paper in a tiny size, from the command line to the Hub and back.

The recipes are those of `examples/recipes`, in the directory where they expect their data: miniatures of all seven
data sets in their official layouts. What is overridden is size alone: of the network, the clips and the run.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from safetensors.torch import load_file
from tiny_backbones import TINY_SWIN

import ausm_hf
from ausm_hf.data.labels import COCO_LABELS, LABEL_SETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH, LENGTH = 64, 96, 6
NETWORK = {
    "backbone_config": TINY_SWIN,
    "pixel_encoder_layers": 1,
    "pixel_encoder_feedforward_size": 32,
    "hidden_size": 32,
    "mask_feature_size": 16,
    "num_attention_heads": 2,
    "num_compressor_layers": 1,
    "num_history_decoder_layers": 1,
    "history_feedforward_size": 32,
    "num_decoder_layers": 2,
    "decoder_feedforward_size": 32,
    "num_id_vectors": 6,
    "num_detection_queries": 5,
    "train_num_points": 200,
}
STEPS = 4
TINY = [
    "data.size=[64, 64]",
    "data.workers=0",
    "data.max_objects=4",
    f"optim.max_steps={STEPS}",
    "save_every=1",
    "log_every=1",
]


def index_mask(t: int) -> np.ndarray:
    """Two objects that move."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[10 + 2 * t : 34 + 2 * t, 8:36] = 1
    mask[20:48, 60 - 3 * t : 84 - 3 * t] = 2
    return mask


def frame(t: int) -> np.ndarray:
    ground = np.random.default_rng(t).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return ground + np.array([[0, 0, 0], [190, 60, 0], [0, 90, 190]], dtype=np.uint8)[index_mask(t)]


def rle(mask: np.ndarray) -> dict:
    encoded = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def write_frames(folder: Path, masks: Path | None = None):
    for t in range(LENGTH):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame(t)).save(folder / f"{t:05d}.jpg")
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(index_mask(t)).save(masks / f"{t:05d}.png")


def write_json(path: Path, content: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_vis(images: Path, source: Path, labels: list[str]):
    """As YouTube-VIS and OVIS."""
    write_frames(images / "0a1b")
    video = {"id": 1, "width": WIDTH, "height": HEIGHT, "length": LENGTH}
    tracks = [
        {
            "id": number,
            "video_id": 1,
            "category_id": number,
            "iscrowd": 0,
            "segmentations": [rle(index_mask(t) == number) for t in range(LENGTH)],
        }
        for number in (1, 2)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(labels, 1)]
    video["file_names"] = [f"0a1b/{t:05d}.jpg" for t in range(LENGTH)]
    write_json(source, {"videos": [video], "categories": categories, "annotations": tracks})


def write_data(data: Path):
    """One video (or image) of each data set, in its official layout."""
    annotations = [
        {"id": n, "image_id": 5, "category_id": n, "iscrowd": 0, "segmentation": rle(index_mask(0) == n)}
        for n in (1, 2)
    ]
    image = {"id": 5, "file_name": "000000000005.jpg", "height": HEIGHT, "width": WIDTH}
    categories = [{"id": number, "name": name} for number, name in enumerate(COCO_LABELS, 1)]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    write_json(data / "coco" / "annotations" / "instances_train2017.json", content)
    (data / "coco" / "train2017").mkdir()
    Image.fromarray(frame(0)).save(data / "coco" / "train2017" / image["file_name"])

    write_frames(data / "mose/train/JPEGImages/0a1b", data / "mose/train/Annotations/0a1b")
    for year, source in ((2019, "train.json"), (2021, "train/instances.json")):
        folder = data / f"youtube_vis_{year}"
        write_vis(folder / "train" / "JPEGImages", folder / source, LABEL_SETS[f"youtube_vis_{year}"])
    write_vis(data / "ovis" / "train", data / "ovis" / "annotations_train.json", LABEL_SETS["ovis"])
    write_frames(data / "davis/JPEGImages/480p/bear", data / "davis/Annotations/480p/bear")
    for split in ("train", "val"):
        listing = data / "davis" / "ImageSets" / "2017" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("bear\n")

    folder = data / "sa_v" / "sav_000"
    masklet = [[rle(index_mask(t) == number) for number in (1, 2)] for t in range(LENGTH)]
    about = {"video_height": HEIGHT, "video_width": WIDTH, "masklet_id": [0, 1], "masklet": masklet}
    write_json(folder / "sav_000001_manual.json", about)
    with av.open(str(folder / "sav_000001.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(4 * LENGTH):  # every fourth frame is annotated
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(number // 4), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def python(hub, tmp_path):
    """Runs Python where the data is, with the Hub double for the Hub."""

    def start(*arguments, package: bool = True) -> subprocess.Popen:
        environment = {**hub.environment(tmp_path / f"hub-cache-{package}"), "OMP_NUM_THREADS": "1"}
        if package:
            environment["PYTHONPATH"] = str(Path(ausm_hf.__file__).parents[1])
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    return start


def finish(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def train(python, stage: str, output_dir: Path, *overrides: str) -> list[dict]:
    """`ausm train`, killed with SIGKILL after its first checkpoint, and again. Returns the lines of the log."""
    arguments = ["-m", "ausm_hf.cli", "train", ROOT / "examples" / "recipes" / f"{stage}.yaml", *TINY, *overrides]
    first = python(*arguments)
    while first.poll() is None and not (output_dir / "step-00000001").is_dir():
        time.sleep(0.005)
    first.kill()
    output = first.communicate()[0]
    assert first.returncode == -signal.SIGKILL, output
    assert not (output_dir / "final").exists()
    output = finish(python(*arguments))
    assert "going on from" in output and output.strip().endswith("final")
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    return lines


def test_three_stages_killed_resumed_evaluated_pushed_and_loaded_back(python, hub, tmp_path):
    write_data(tmp_path / "data")
    runs = tmp_path / "runs"
    network = json.dumps({"preset": "tiny", "overrides": NETWORK, "label_sets": {"coco": None}})
    train(python, "stage1_coco_pseudo_swin_t", runs / "stage1_swin_t", f"model={network}")
    # Never killed, it ends with the very same weights.
    recipe = ROOT / "examples" / "recipes" / "stage1_coco_pseudo_swin_t.yaml"
    finish(python("-m", "ausm_hf.cli", "train", recipe, *TINY, f"model={network}", "output_dir=runs/whole"))
    whole, resumed = (load_file(runs / name / "final" / "model.safetensors") for name in ("whole", "stage1_swin_t"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    train(python, "stage2_short_clips_swin_t", runs / "stage2_swin_t")
    train(python, "stage3_long_clips_swin_t", runs / "stage3_swin_t")

    final = runs / "stage3_swin_t" / "final"
    evaluation = [
        "evaluate",
        "--benchmark",
        "davis2017",
        "--root",
        "data/davis",
        "--model",
        final,
        "--output",
        "scores",
    ]
    assert "davis2017 val, prompted: J&F" in finish(python("-m", "ausm_hf.cli", *evaluation))
    score = json.loads((tmp_path / "scores" / "results.json").read_text())["scores"]["J&F"]["J&F"]

    push = [ROOT / "examples" / "push_to_hub.py", final, "user/ausm-base", "--results", "scores/results.json"]
    assert f"{hub.url}/user/ausm-base" in finish(python(*push))
    card = hub.repos["models/user/ausm-base"]["README.md"].decode()
    assert f"| davis2017 | val | prompted | J&F | J&F | {100 * score:.1f} |" in card
    assert f"| steps | {STEPS} |" in card and "coco, mose, sa_v, youtube_vis, ovis, davis" in card

    load = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForUniversalSegmentation
model = AutoModelForUniversalSegmentation.from_pretrained("user/ausm-base", trust_remote_code=True)
model.save_pretrained("loaded")
trained, loaded = load_file("FINAL/model.safetensors"), load_file("loaded/model.safetensors")
assert trained.keys() == loaded.keys() and all(torch.equal(trained[name], loaded[name]) for name in trained)
print(type(model).__module__, *sorted(model.class_heads))
""".replace("FINAL", str(final))
    printed = finish(python("-c", load, package=False)).splitlines()[-1].split()
    assert printed[0].startswith("transformers_modules.")
    assert printed[1:] == ["coco", "ovis", "youtube_vis_2019", "youtube_vis_2021"]


def test_the_recipes_of_the_larger_network(python, tmp_path):
    """Swin-B's three stages, two steps each; every stage starts from what the one before it left."""
    write_data(tmp_path / "data")
    network = json.dumps({"preset": "base", "overrides": NETWORK, "label_sets": {"coco": None}})
    for stage, *overrides in (
        ("stage1_coco_pseudo_swin_b", f"model={network}"),
        ("stage2_short_clips_swin_b",),
        ("stage3_long_clips_swin_b",),
    ):
        recipe = ROOT / "examples" / "recipes" / f"{stage}.yaml"
        finish(python("-m", "ausm_hf.cli", "train", recipe, *TINY, "optim.max_steps=2", *overrides))
    weights = [load_file(tmp_path / f"runs/stage{n}_swin_b/final/model.safetensors") for n in (1, 2, 3)]
    for before, after in zip(weights, weights[1:]):
        shared = [name for name in before if not name.startswith("class_heads.")]
        assert any(not torch.equal(before[name], after[name]) for name in shared)
    # The paper's stage 3 freezes the backbone.
    backbone = [name for name in weights[1] if ".backbone." in name]
    assert backbone and all(torch.equal(weights[1][name], weights[2][name]) for name in backbone)
