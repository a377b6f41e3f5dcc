"""Recipes through the real data and the real network, in their smallest size."""

import functools
import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ausm_hf import AusmForUniversalSegmentation, AusmProcessor
from ausm_hf.training import load_recipe, train
from ausm_hf.training.data import build_data
from ausm_hf.training.forms import CarriedForm, IterativeForm, RollOut
from ausm_hf.training.loop import build_config, build_processor


@pytest.fixture
def videos(tmp_path):
    """Two videos of eight frames with two objects each, as `video_folder` reads them."""
    for name in ("a", "b"):
        (tmp_path / "videos" / "videos" / name).mkdir(parents=True)
        (tmp_path / "videos" / "masks" / name).mkdir(parents=True)
        for t in range(8):
            frame = np.full((96, 128, 3), 60, dtype=np.uint8)
            mask = np.zeros((96, 128), dtype=np.uint8)
            for number, (top, left) in enumerate([(10 + 3 * t, 10), (50, 90 - 5 * t)], start=1):
                frame[top : top + 30, left : left + 30] = 100 * number
                mask[top : top + 30, left : left + 30] = number
            Image.fromarray(frame).save(tmp_path / "videos" / "videos" / name / f"{t:05d}.png")
            Image.fromarray(mask).save(tmp_path / "videos" / "masks" / name / f"{t:05d}.png")
    labels = {name: {"1": "fish", "2": "diver"} for name in ("a", "b")}
    (tmp_path / "videos" / "labels.json").write_text(json.dumps(labels))
    return tmp_path / "videos"


@pytest.fixture
def recipe_file(tmp_path, videos, tiny_config):
    keys = (
        "hidden_size",
        "mask_feature_size",
        "num_compressor_layers",
        "num_history_decoder_layers",
        "num_decoder_layers",
        "history_feedforward_size",
        "decoder_feedforward_size",
        "num_id_vectors",
        "num_detection_queries",
    )
    backbone = tiny_config.backbone_config.to_dict()
    overrides = {key: getattr(tiny_config, key) for key in keys}
    overrides["backbone_config"] = {
        key: backbone[key]
        for key in ("model_type", "stem_width", "widths", "depths", "kernel_sizes", "strides", "expand_ratios")
    }
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"preset": "nano", "overrides": overrides, "label_sets": {"mine": ["fish", "diver"]}},
        "data": {
            "sources": [
                {
                    "dataset": "video_folder",
                    "arguments": {"root": str(videos), "label_set": "mine", "exhaustive": True},
                    "strides": [1, 2],
                }
            ],
            "num_frames": 3,
            "size": [64, 96],
            "batch_size": 2,
            "max_objects": 4,
        },
        "optim": {"max_steps": 2, "lr": 1e-3},
        "log_every": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_another_seed_draws_other_clips(recipe_file):
    def first_clip(seed):
        recipe = load_recipe(recipe_file, [f"seed={seed}"])
        config = build_config(recipe)
        return build_data(recipe, config, build_processor(recipe, config).image_processor)[0][0]["pixel_values"]

    assert torch.equal(first_clip(1), first_clip(1)) and not torch.equal(first_clip(1), first_clip(2))


def test_gradient_checkpointing_trains_the_same_weights(recipe_file, tmp_path):
    plain, checkpointed = (
        AusmForUniversalSegmentation.from_pretrained(
            train(load_recipe(recipe_file, [f"gradient_checkpointing={on}", f"output_dir={tmp_path / on}"]))
        ).state_dict()
        for on in ("false", "true")
    )
    for name, weight in plain.items():
        torch.testing.assert_close(checkpointed[name], weight, atol=1e-5, rtol=1e-4)


def test_two_stages(recipe_file, tmp_path):
    first = train(load_recipe(recipe_file, ["eval_every=2", "history_corruption=0.5", "ema_decay=0.9"]))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[0]["class"] > 0
    assert "sample_iou" in lines[-1] and (tmp_path / "run" / "samples" / "step-00000002.jpg").exists()
    network = AusmForUniversalSegmentation.from_pretrained(first)
    assert network.config.label_sets == {"mine": ["fish", "diver"]}
    assert network.config.id2label == {0: "fish", 1: "diver"}
    processor = AusmProcessor.from_pretrained(first)
    assert processor.image_processor.size == {"shortest_edge": 64, "longest_edge": 128}

    # The second stage starts from the first, keeps its head and gets one more.
    stage = [
        "model={path: " + str(first) + ", label_sets: {mine: [fish, diver], coco: null}}",
        f"output_dir={tmp_path / 'second'}",
        "freeze_backbone=true",
        "optim.max_steps=1",
        "optim.lr=0",
    ]
    second = AusmForUniversalSegmentation.from_pretrained(train(load_recipe(recipe_file, stage)))
    assert second.config.default_label_set == "mine" and second.class_heads["coco"].out_features == 81
    before, after = network.state_dict(), second.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("option", "form", "calls"),
    [
        ("data.workers=1", AusmForUniversalSegmentation, 2),
        ("scheduled_sampling=1.0", AusmForUniversalSegmentation, 4),
        ("scheduled_sampling=1.0 scheduled_sampling_form=iterative", RollOut, 2),
        ("carried_state=2", CarriedForm, 4),
        ("mode=iterative", IterativeForm, 2),
    ],
)
def test_every_form_trains(recipe_file, tmp_path, monkeypatch, option, form, calls):
    """Two steps; a form is called once a step, or once for each pass or piece of it."""
    made, states = [], []
    original = form.forward

    @functools.wraps(original)
    def counting(self, *args, **kwargs):
        made.append(torch.is_grad_enabled())
        states.append(kwargs.get("history"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(form, "forward", counting)
    train(load_recipe(recipe_file, option.split()))
    assert len(made) == calls
    if form is CarriedForm:  # the second piece of a clip goes on from the first
        assert [state is None for state in states] == [True, False, True, False]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["grad_norm"] < float("inf") for line in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.0.dataset=davis2", r"^data.sources\[0\].dataset: there is no data set 'davis2'"),
        ("data.sources.0.colour=red", r"^data.sources\[0\].colour: unknown key"),
        ("data.sources.0.arguments.colour=red", r"^data.sources\[0\].arguments.colour: unknown"),
        ("data.sources.0.arguments={label_set: mine}", r"^data.sources\[0\].arguments.root: missing"),
        ("data.sources.0.arguments.label_set=coco", r"^data.sources\[0\]: its label set 'coco' has no class head"),
        ("data.sources.0.strides=3", r"^data.sources\[0\].strides: got 3 \(int\), want list\[int\]"),
        (
            "data.sources.0.strides=[0, 1]",
            r"^data.sources\[0\].strides: got \[0, 1\], want frame distances",
        ),
        ("data.sources.0.strides=[]", r"^data.sources\[0\].strides: got \[\], want"),
        ("data.sources.0.paste=30", r"^data.sources\[0\].paste: got 30.0, want from 0 to 1"),
        ("data.sources.0.cut=-1", r"^data.sources\[0\].cut: got -1.0, want from 0 to 1"),
        ("data.sources.0.reverse=-0.1", r"^data.sources\[0\].reverse: got -0.1, want from 0 to 1"),
        ("data.sources.0.weight=0", r"^data.sources\[0\].weight: got 0.0, want a positive number"),
        ("data.sources.0.detect='no'", r"^data.sources\[0\].detect: got 'no' \(str\), want bool"),
        ("model.label_sets.mine=[fish]", r"^data.sources\[0\]: model.label_sets.mine lacks 1 of its labels: 'diver'"),
        ("data.max_objects=5", "^data.max_objects: 5 objects in a clip, but the network has only 4"),
        ("model.overrides.colour=red", "^model.overrides.colour: unknown key"),
        ("model.overrides.to_dict=3", "^model.overrides.to_dict: unknown key"),
        ("model.overrides.class_weight=heavy", "^model: Field 'class_weight'"),
        ("model.overrides.num_id_vectors=0", "^model: `num_id_vectors` must lie in 1 .. 16384, got 0"),
        ("model.overrides.num_id_vectors=many", "^model: Field 'num_id_vectors' expected int, got str"),
        ("model.label_sets={keys: [fish]}", "^model: The name of a label set .* that torch doesn't use, got 'keys'"),
    ],
)
def test_what_only_the_data_and_the_network_know_is_checked_too(recipe_file, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(load_recipe(recipe_file, [override]))
    assert not (tmp_path / "run").exists()


def test_numbers_of_a_source_may_be_text(recipe_file):
    recipe = load_recipe(recipe_file, ["data.sources.0.weight='1e-1'", "data.sources.0.paste='1e-1'"])
    config = build_config(recipe)
    mixture, _ = build_data(recipe, config, build_processor(recipe, config).image_processor)
    assert mixture.sources[0].paste == 0.1 and mixture.sources[0].strides == [1, 2]


def test_missing_files_are_reported_together(recipe_file, videos):
    for t in (2, 3):
        (videos / "videos" / "a" / f"{t:05d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 empty"):
        train(load_recipe(recipe_file))


def test_tensorboard(recipe_file, tmp_path):
    pytest.importorskip("tensorboard")
    train(load_recipe(recipe_file, ["tracker=tensorboard"]))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
