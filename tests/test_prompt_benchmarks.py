"""`benchmarks/prompts.py`, `clicks.py` and `slot_reuse.py`, on what is smallest."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ausm_hf import AusmImageProcessor, AusmProcessor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    for folder in ("JPEGImages/480p/square", "Annotations/480p/square", "ImageSets/2016"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/2016/dev.txt").write_text("square\n")
    for t in range(16):
        mask = np.zeros((48, 64), np.uint8)
        mask[12:30, 8 + t : 26 + t] = 255
        Image.fromarray(mask).save(root / f"Annotations/480p/square/{t:05d}.png")
        Image.fromarray(np.stack([mask // 2] * 3, -1)).save(root / f"JPEGImages/480p/square/{t:05d}.jpg")
    return root


def test_prompts(davis, tiny_checkpoint, tmp_path, capsys):
    main = runpy.run_path(str(BENCHMARKS / "prompts.py"))["main"]
    options = ["--root", davis, "--model", tiny_checkpoint, "--frames", 4, "--output", tmp_path / "prompts.json"]
    main([*map(str, options), "--device", "cpu"])
    content = json.loads((tmp_path / "prompts.json").read_text())
    means = content["mean"]
    assert list(means) == ["mask", "box", "box, filled", "1 click", "3 clicks", "5 clicks"]
    # The object is a box: the true mask and its filled box are one.
    assert means["mask"]["first"] == means["box, filled"]["first"] == 1
    assert means["mask"]["followed"] == means["box, filled"]["followed"] and 0 <= means["box"]["followed"] <= 1
    assert content["sequences"]["square"] == means
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + 6


def test_clicks_go_where_the_mask_is_wrong():
    next_click = runpy.run_path(str(BENCHMARKS / "prompts.py"))["next_click"]
    true = np.zeros((30, 40), bool)
    true[5:16, 10:21] = True
    assert next_click(np.zeros_like(true), true) == ([15.5, 10.5], 1)
    too_much = true.copy()
    too_much[20:29, 30:39] = True
    too_much[5, 10] = False
    assert next_click(too_much, true) == ([34.5, 24.5], 0)
    assert next_click(true, true) is None


def test_clicks_by_themselves_and_together(tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    clicked = runpy.run_path(str(BENCHMARKS / "clicks.py"))["clicked"]
    masks = {3: np.zeros((64, 96), bool), 5: np.zeros((64, 96), bool)}
    masks[3][8:40, 8:40], masks[5][20:60, 50:90] = True, True
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    together = clicked(frame, masks, tiny_model, processor)
    assert together.keys() == masks.keys() and all(mask.shape == (64, 96) for mask in together.values())
    assert not (together[3] & together[5]).any()
    assert together[3][24, 24] and together[5][40, 70]
    assert clicked(frame, {3: masks[3]}, tiny_model, processor).keys() == {3}


def test_only_the_marked_object_gets_the_slot_that_is_looked_at():
    session = SimpleNamespace()
    runpy.run_path(str(BENCHMARKS / "slot_reuse.py"))["hold"](session, 3)
    marked, bystander = SimpleNamespace(slot=3), SimpleNamespace(slot=0)
    assert session.draw_slots(1, 6, []) == [3]
    assert session.draw_slots(0, 6, []) == []
    assert session.draw_slots(2, 6, [marked]) == [0, 1]
    assert session.draw_slots(9, 6, [marked, bystander]) == [1, 4, 5]


def test_slot_reuse(davis, tiny_checkpoint, tmp_path):
    main = runpy.run_path(str(BENCHMARKS / "slot_reuse.py"))["main"]
    main(["--root", str(davis), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "slots.json")])
    ways = json.loads((tmp_path / "slots.json").read_text())["sequences"]["square"]
    assert list(ways) == ["same slot", "another slot", "another slot, no past"]
    assert all(0 <= value <= 1 for way in ways.values() for value in way.values())
    assert ways["another slot, no past"]["IoU"] == 1  # with itself
