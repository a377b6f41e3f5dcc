"""`ausm_hf.checkpoints.fit_labels`: the head for COCO's labels, fitted to photographs."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmImageProcessor, AusmProcessor
from ausm_hf.checkpoints import fit_labels as module
from ausm_hf.data.labels import COCO_LABELS

LABELS = {"cat": (200, 60, 40), "dog": (40, 90, 210)}


@pytest.fixture
def root(tmp_path):
    """Photographs of one red cat and one blue dog each."""
    folder = tmp_path / "data" / "stills" / "pets"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng, instances = np.random.default_rng(0), {}
    for number in range(6):
        picture = rng.integers(90, 160, (64, 96, 3), dtype=np.uint8)
        ids = np.zeros((64, 96), np.uint8)
        for i, (label, left) in enumerate(zip(LABELS, rng.permutation([4, 52])), start=1):
            part = np.s_[12:52, left : left + 36]
            picture[part] = rng.integers(-20, 20, (40, 36, 3)) + LABELS[label]
            ids[part] = i
        Image.fromarray(picture).save(folder / "images" / f"{number}.webp", lossless=True)
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
        instances[str(number)] = {str(i): label for i, label in enumerate(LABELS, start=1)}
    (folder / "meta.json").write_text(json.dumps({"name": "pets", "exhaustive": True, "instances": instances}))
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """Of a random network whose heads read the queries' states alone, stored in float16."""
    content = {**tiny_config.to_dict(), "mask_pooling": False, "default_label_set": "object"}
    content["label_sets"] = {"object": ["object"], "coco": COCO_LABELS}
    config = AusmConfig.from_dict({**content, "id2label": None, "label2id": None})
    torch.manual_seed(0)
    model = AusmForUniversalSegmentation(config)
    folder = tmp_path / "checkpoint"
    config.save_pretrained(folder)
    AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})).save_pretrained(folder)
    save_file(
        {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()},
        folder / "model.safetensors",
    )
    return folder


def test_the_head_is_fitted_and_all_else_stays(checkpoint, root, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETS", {"pets": 4})
    before = load_file(checkpoint / "model.safetensors")
    folder = module.fit_labels(checkpoint, root, tmp_path / "of" / "labels" / "fitted")
    after = load_file(folder / "model.safetensors")
    for name, tensor in before.items():
        if not name.startswith("class_heads"):
            assert torch.equal(after[name], tensor)
    size = before["class_heads.coco.weight"].shape[1]
    kept, fitted = after["class_heads.object.weight"], after["class_heads.coco.weight"]
    assert torch.equal(kept[:, :size], before["class_heads.object.weight"]) and not kept[:, size:].any()
    assert fitted.dtype == torch.float16
    assert AusmConfig.from_pretrained(folder).id2label == dict(enumerate(COCO_LABELS))

    model = AusmForUniversalSegmentation.from_pretrained(folder, dtype=torch.float32).eval()
    features, labels = module.labelled_features(model, AusmProcessor.from_pretrained(folder), root)
    assert len(labels) >= 6 * 2 * 2  # whole and mirrored; of parts of a photograph objects may be left out
    named = model.class_heads["coco"](features).argmax(1)
    assert (named == labels).float().mean() > 0.95
    # In its own place, and again from what it wrote: the same numbers.
    again = module.fit_labels(folder, root, folder)
    torch.testing.assert_close(
        load_file(again / "model.safetensors")["class_heads.coco.weight"], fitted, atol=1e-2, rtol=0
    )


def test_what_is_found_beside_all_objects_is_none_of_the_labels(checkpoint, root, monkeypatch):
    """A scripted detector: query 0 is on the cat, 1 on cat and ground, 2 on the ground, 3 there too but not sure."""
    (row, *_) = module.stills(str(root / "stills" / "pets"), "train")
    frame = module.load_frames(row, [0])[0]
    masks, _ = module.load_masks(row, 0, *frame.shape[:2])
    cat, known = masks[1], masks[1] | masks[2]
    ground = np.zeros_like(cat)
    ground[:10] = True
    model, _ = module.load(checkpoint)
    step = model.model.step

    def scripted(*arguments):
        output = step(*arguments)
        queries = torch.from_numpy(np.stack([cat, cat | ground, ground, ground]))[:, ::4, ::4]
        output.masks_queries_logits = torch.where(queries, 5.0, -5.0)[None]
        output.query_hidden_states = output.query_hidden_states[:, :1].expand(-1, 4, -1)
        output.class_features = torch.arange(4.0)[None, :, None].expand(-1, -1, output.class_features.shape[-1])
        return output

    monkeypatch.setattr(model.model, "step", scripted)
    foreground = torch.tensor([0.9, 0.9, 0.3, 0.1]).logit()[None, :, None]
    monkeypatch.setattr(model.foreground_head, "forward", lambda states: foreground)
    processor = AusmProcessor.from_pretrained(checkpoint)
    features = [(i, int(x[0])) for i, x in module.class_features(model, processor, frame, cat[None], known)]
    assert features[1:] == [(0, 0), (-1, 2)]  # the first is the marked object


def test_views_keep_masks_on_their_objects():
    frame = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    masks = frame.sum(2)[None] > 400
    shown = list(module.views(frame, masks, 6, np.random.default_rng(0)))
    assert np.array_equal(shown[0][0], frame) and np.array_equal(shown[1][0], frame[:, ::-1])
    assert len({picture.shape for picture, _ in shown}) > 2
    for picture, parts in shown:
        assert np.array_equal(parts[0], picture.sum(2) > 400)


def test_rare_labels_and_labels_that_were_never_seen():
    torch.manual_seed(0)
    centers = torch.randn(3, 8) * 3
    labels = torch.cat([torch.zeros(200), torch.ones(200), torch.full((5,), 2.0)]).long()
    weight, bias = module.fit(centers[labels] + torch.randn(len(labels), 8), labels)
    assert weight.shape == (81, 8) and bias.shape == (81,)
    logits = centers @ weight.T + bias
    assert torch.equal(logits.argmax(1), torch.arange(3))
    assert logits.softmax(1)[:, 3:].max() < 1e-6


def test_checkpoints_that_cannot_be_fitted(checkpoint, root, tmp_path):
    content = json.loads((checkpoint / "config.json").read_text())
    content["label_sets"]["coco"] = ["cat"]
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no label set 'coco' with COCO's 80 labels"):
        module.fit_labels(other, root, tmp_path / "fitted")
    assert not (tmp_path / "fitted").exists()
