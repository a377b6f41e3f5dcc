"""Every snippet of README.md and docs/*.md runs, or says on the page why it doesn't.

The snippets of a page run from top to bottom in one namespace, in a folder with tiny data and with a tiny untrained
network in place of `ausm-nano`. Shell commands are checked (the command, its options, the files of this repository)
and run in this process. A comment right before a snippet says otherwise:

    <!-- slow: REASON -->                       runs only with `-m slow`
    <!-- not run: REASON -->                    is only checked: syntax, imported names, commands and options
    <!-- here `A` is `B`: REASON -->            runs with B in place of A
"""

import ast
import copy
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ausm_hf
from ausm_hf.cli import build_parser, main
from ausm_hf.training import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "console", "bash", "yaml", "json", "text", "bibtex", "mermaid"}
FENCE = re.compile(r"(?P<markers>(?:^<!-- [^\n]* -->\n)*)^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
REPLACE = re.compile(r"here `(?P<old>[^`]+)` is `(?P<new>[^`]+)`: \S.*")


@dataclass
class Snippet:
    place: str  # page and line
    language: str
    text: str
    how: str = "run"  # or "slow", "not run"

    @property
    def commands(self) -> list[list[str]]:
        """A shell snippet's commands, split into words."""
        lines = self.text.replace("\\\n", " ").splitlines()
        lines = [line.removeprefix("$ ") for line in lines if self.language == "bash" or line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def snippets_of(page: Path) -> list[Snippet]:
    content = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(content):
        place = f"{page.name}, line {content.count(chr(10), 0, match.start('language')) + 1}"
        snippet = Snippet(place, match["language"], match["text"])
        assert snippet.language in LANGUAGES, f"{place}: a snippet needs one of {sorted(LANGUAGES)}"
        for marker in re.findall(r"<!-- (.*) -->", match["markers"]):
            if replacement := REPLACE.fullmatch(marker):
                assert replacement["old"] in snippet.text, f"{place}: there is no {replacement['old']!r}"
                snippet.text = snippet.text.replace(replacement["old"], replacement["new"])
            else:
                how, _, reason = marker.partition(": ")
                assert how in ("slow", "not run") and reason, f"{place}: unknown marker {marker!r}"
                snippet.how = how
        found.append(snippet)
    fences = sum(line.startswith("```") for line in content.splitlines())
    assert fences == 2 * len(found), f"{page.name}: {fences} fences, {len(found)} snippets"
    return found


def check_python(snippet: Snippet):
    """Syntax, and that what is imported from here exists."""
    for node in ast.walk(ast.parse(snippet.text, snippet.place)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ausm_hf":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{snippet.place}: {node.module} has no {alias.name}"


def check_command(words: list[str], place: str):
    """That a command line could run here, as far as can be seen from outside."""
    program, *arguments = words
    if program == "ausm":
        build_parser().parse_args(arguments)
    elif program in ("accelerate", "torchrun"):
        script = next(i for i, word in enumerate(arguments) if word in ("-m", "ausm") or word.endswith(".py"))
        if arguments[script] == "-m":
            assert arguments[script + 1] == "ausm_hf.cli", place
            build_parser().parse_args(arguments[script + 2 :])
        else:
            check_command(["python", *arguments[script:]], place)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None, f"{place}: there is no module {arguments[1]}"
    elif program == "python":
        script = ROOT / arguments[0]
        assert script.is_file(), f"{place}: there is no {arguments[0]}"
        for option in re.findall(r"^--[\w-]+", "\n".join(arguments[1:]), re.M):
            assert f'"{option}"' in script.read_text(), f"{place}: {arguments[0]} has no option {option}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        assert not unknown, f"{place}: the Makefile has no {unknown}"
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
        extras = re.findall(r"^(\w+) = \[", project.split("\n[")[0], re.M)
        named = [extra for word in arguments for part in re.findall(r"\[(.*)\]", word) for extra in part.split(",")]
        assert set(named) <= set(extras), f"{place}: there is no extra {set(named) - set(extras)}"
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"{place}: there is no {arguments[0]}"
    elif program in ("git", "cd", "hf", "ffmpeg"):
        pass
    else:
        raise AssertionError(f"{place}: {program!r} is no command of this project")


def run_command(words: list[str], place: str, monkeypatch):
    program, *arguments = words
    if program == "ausm":
        main(arguments)
    elif program == "python" and arguments[0] != "-m":
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
    elif program == "python":
        importlib.import_module(arguments[1]).main(arguments[2:])
    else:
        raise AssertionError(f"{place}: {program!r} can't run here; say <!-- not run: why -->")


@pytest.fixture
def tiny_nano(tiny_config, tmp_path, monkeypatch):
    """The network of `tiny_config`, untrained, wherever `ausm-nano` would be loaded."""
    from transformers.pipelines import PIPELINE_REGISTRY

    config = copy.deepcopy(tiny_config)
    config.num_id_vectors = 8
    config.label_sets, config.default_label_set = {"object": ["object"], "coco": ["cat", "dog"]}, "object"
    torch.manual_seed(0)
    folder = tmp_path / "ausm-nano"
    processor = ausm_hf.AusmProcessor(ausm_hf.AusmImageProcessor(size={"shortest_edge": 64}))
    pipeline = ausm_hf.VideoSegmentationPipeline(
        ausm_hf.AusmForUniversalSegmentation(config), processor=processor, device="cpu"
    )
    pipeline.save_pretrained(folder)
    for module in ("ausm_hf.segment", "ausm_hf.checkpoint"):
        monkeypatch.setattr(importlib.import_module(module), "BUNDLED_CHECKPOINT", folder)
    task = PIPELINE_REGISTRY.supported_tasks["video-segmentation"]
    monkeypatch.setitem(task, "default", {"model": (str(folder), "main")})


@pytest.fixture
def folder(moving_square, tmp_path, monkeypatch):
    """What the pages speak of, in the smallest size: a video, a folder of one's own videos, data sets."""
    frames, masks = moving_square
    here = tmp_path / "here"
    here.mkdir()
    with ausm_hf.VideoWriter(here / "street.mp4", fps=10, size=(48, 64)) as writer:
        for frame in frames:
            writer.write(frame)
    Image.fromarray(masks[0]).save(here / "first_frame.png")
    for name in ("frames", "my_videos/videos/dive", "my_videos/masks/dive", "city/frames/one", "city/masks/one"):
        (here / name).mkdir(parents=True)
    (here / "my_videos" / "labels.json").write_text('{"dive": {"1": "fish"}}')
    shutil.copy(here / "street.mp4", here / "my_videos" / "videos" / "walk.mp4")
    for t in range(6):
        for place in ("frames", "my_videos/videos/dive", "city/frames/one"):
            Image.fromarray(frames[t]).save(here / place / f"{t:05d}.jpg", quality=95)
        for place in ("my_videos/masks/dive", "city/masks/one"):
            Image.fromarray(masks[t]).save(here / place / f"{t:05d}.png")
    (here / "my_videos" / "masks" / "walk").mkdir()
    Image.fromarray(masks[3]).save(here / "my_videos" / "masks" / "walk" / "00003.png")
    write_davis(here / "DAVIS", frames, masks)
    write_vis(here, masks)
    monkeypatch.chdir(here)
    return here


def write_davis(root: Path, frames: np.ndarray, masks: np.ndarray):
    for year in (2016, 2017):
        (root / "ImageSets" / str(year)).mkdir(parents=True)
        for split in ("train", "val", "dev"):
            (root / "ImageSets" / str(year) / f"{split}.txt").write_text("square\n")
    for kind in ("JPEGImages", "Annotations"):
        (root / kind / "480p" / "square").mkdir(parents=True)
    for t in range(len(frames)):
        Image.fromarray(frames[t]).save(root / "JPEGImages" / "480p" / "square" / f"{t:05d}.jpg", quality=95)
        Image.fromarray(masks[t]).save(root / "Annotations" / "480p" / "square" / f"{t:05d}.png")


def write_vis(root: Path, masks: np.ndarray):
    """`my_clips.json`, a YouTube-VIS style JSON of `my_videos/videos`."""
    rows = [np.flatnonzero(np.diff(np.pad(mask.T.ravel(), 1, constant_values=2))) for mask in masks]
    counts = [np.diff(row).tolist() for row in rows]  # column by column, beginning with background
    names = [f"dive/{t:05d}.jpg" for t in range(len(masks))]
    content = {
        "videos": [{"id": 1, "file_names": names, "height": 48, "width": 64}],
        "categories": [{"id": 1, "name": "fish"}],
        "annotations": [
            {
                "id": 1,
                "video_id": 1,
                "category_id": 1,
                "iscrowd": 0,
                "segmentations": [{"size": [48, 64], "counts": c} for c in counts],
            }
        ],
    }
    (root / "my_clips.json").write_text(json.dumps(content))


def play(page: Path, slow: bool, monkeypatch):
    namespace, recipes = {"__name__": "__main__"}, []
    for snippet in snippets_of(page):
        text = snippet.text
        if snippet.language == "python":
            check_python(snippet)
        if snippet.language in ("bash", "console"):
            for words in snippet.commands:
                check_command(words, snippet.place)
        if snippet.language == "json":
            json.loads(text)
        if snippet.how == "not run" or (snippet.how == "slow" and not slow):
            continue
        if snippet.language == "yaml":  # a recipe, which stands in a file of the name in its first line
            first = text.splitlines()[0]
            assert first.startswith("# ") and first.endswith(".yaml"), f"{snippet.place}: want '# NAME.yaml' first"
            Path(first[2:]).write_text(text)
            recipes.append(first[2:])
        elif snippet.language == "python":
            # As many lines before it as on the page: a traceback then names the right line.
            line = int(snippet.place.rsplit(" ", 1)[1])
            exec(compile("\n" * line + text, str(page), "exec"), namespace)
        elif snippet.language in ("bash", "console"):
            for words in snippet.commands:
                run_command(words, snippet.place, monkeypatch)
    for recipe in recipes:
        load_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets(page, folder, tiny_nano, monkeypatch):
    play(page, False, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(snippet.how == "slow" for snippet in snippets_of(page))],
    ids=lambda page: page.name,
)
def test_slow_snippets(page, folder, tiny_nano, monkeypatch):
    play(page, True, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    content = re.sub(r"```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", content)
    assert links or page.name != "README.md"
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        target, _, section = link.partition("#")
        target = page if not target else Path(os.path.normpath(page.parent / target))
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert section in anchors, f"{page.name}: {target.name} has no section #{section}"


@pytest.mark.parametrize(
    "text, message",
    [
        ("```\nx\n```\n", "needs one of"),
        ("<!-- skip -->\n```python\nx\n```\n", "unknown marker"),
        ("<!-- not run: -->\n```python\nx\n```\n", "unknown marker"),
        ("<!-- here `5` is `2`: why -->\n```python\nx = 1\n```\n", "there is no '5'"),
        ("```bash\nausm segment a.mp4 --colour\n```\n", "unrecognized arguments"),
        ("```bash\nausm segmnt a.mp4\n```\n", "invalid choice"),
        ("```bash\nmake breakfast\n```\n", "has no"),
        ("```bash\nmake demo\n```\n", "can't run here"),
        ("```bash\nrm -rf /\n```\n", "no command of this project"),
        ("```bash\npython examples/train.py --fast\n```\n", "no option --fast"),
        ("```bash\npython examples/missing.py\n```\n", "there is no examples/missing.py"),
        ("```bash\npip install 'ausm-hf[breakfast]'\n```\n", "no extra"),
        ("```python\nfrom ausm_hf import Nothing\n```\n", "has no Nothing"),
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```json\n{\n```\n", "Expecting"),
        ("  ```python\n1\n```\n", "fences"),
    ],
)
def test_a_bad_page_fails(text, message, tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError), match=re.escape(message)):
        play(tmp_path / "page.md", True, monkeypatch)
