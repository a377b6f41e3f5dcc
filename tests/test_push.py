"""A checkpoint on the Hub: pushed by the example, loaded by processes that have never seen it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import ausm_hf
from ausm_hf import AusmModel
from ausm_hf.checkpoint import push_checkpoint
from ausm_hf.segment import fingerprint, load_model

ROOT = Path(__file__).parents[1]
SOURCE = str(Path(ausm_hf.__file__).parents[1])
USE_PACKAGE = f"import sys; sys.path.insert(0, {SOURCE!r}); import ausm_hf\n"


def python(hub, home, *arguments, **environment):
    """Runs Python in the folder `home`, with the Hub double for the Hub and an empty cache if `home` is new."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    environment = {**hub.environment(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    """What training leaves: a recipe, and the result beside it."""
    shutil.copytree(tiny_checkpoint, tmp_path / "run" / "final")
    recipe = {
        "model": {"preset": None, "path": "/home/somebody/runs/stage2/final"},
        "data": {
            "mixture": None,
            "sources": [{"dataset": "davis", "arguments": {"root": "/home/somebody/davis"}}],
            "num_frames": 16,
            "size": [64, 96],
            "batch_size": 2,
        },
        "optim": {"max_steps": 123, "lr": 0.0004},
        "mode": "parallel",
        "freeze_backbone": True,
    }
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = {
        "settings": {"benchmark": "davis2017", "split": "val", "mode": "prompted"},
        "scores": {"J&F": {"J&F": 0.1234, "J": 0.1, "J_recall": 0.3, "F": 0.1468, "sequences": {"a": {"J": 0.7}}}},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "run"


def test_push_and_load_in_clean_processes(hub, run, tmp_path, hide_package):
    options = ["--license", "apache-2.0", "--results", tmp_path / "results.json"]
    example = ROOT / "examples" / "push_to_hub.py"
    pushed = python(hub, tmp_path / "pusher", example, run / "final", "user/ausm-base", *options, PYTHONPATH=SOURCE)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{hub.url}/user/ausm-base"
    files = hub.repos["models/user/ausm-base"]
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_ausm.py", "README.md"} <= set(files)
    assert sum(request.endswith("/commit/main") for request in hub.requests) == 1

    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"J&F": 12.3, "J": 10.0, "F": 14.7}
    assert "| davis2017 | val | prompted | J&F | J | 10.0 |" in card.text
    assert 'pipeline("video-segmentation", model="user/ausm-base", trust_remote_code=True)' in card.text
    for fact in ("| steps | 123 |", "| data | davis |", "| backbone | frozen |", "| label sets (labels) | pets (2) |"):
        assert fact in card.text
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content or b"/home/" in content]

    pixel_values = np.random.default_rng(0).random((1, 2, 3, 64, 96), dtype=np.float32)
    np.save(tmp_path / "input.npy", pixel_values)
    with torch.no_grad():
        states = AusmModel.from_pretrained(run / "final").eval()(torch.from_numpy(pixel_values)).query_hidden_states
    np.save(tmp_path / "states.npy", states.numpy())
    use = f"""
import numpy as np, torch
from transformers import AutoModel, pipeline
options = OPTIONS
model = AutoModel.from_pretrained("user/ausm-base", **options).eval()
with torch.no_grad():
    states = model(torch.from_numpy(np.load({str(tmp_path / "input.npy")!r}))).query_hidden_states
assert np.abs(states.numpy() - np.load({str(tmp_path / "states.npy")!r})).max() < 1e-6
segment = pipeline("video-segmentation", model="user/ausm-base", device="cpu", **options)
frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
results = segment(frames, threshold=0.0)
assert len(results) == 2 and results[0][0]["mask"].size == (64, 48)
print(type(model).__module__, type(segment.model).__module__, "ausm_hf" in sys.modules)
"""
    done = python(
        hub, tmp_path / "without", "-c", hide_package + use.replace("OPTIONS", "dict(trust_remote_code=True)")
    )
    assert done.returncode == 0, done.stderr
    *modules, package = done.stdout.split()
    for module in modules:
        assert module.startswith("transformers_modules.user.") and module.endswith(".modeling_ausm")
    assert package == "False"
    done = python(hub, tmp_path / "with", "-c", USE_PACKAGE + use.replace("OPTIONS", "{}"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ausm_hf.model.modeling_ausm"] * 2 + ["True"]


@pytest.fixture
def use_hub(hub, monkeypatch):
    """Makes this process take the double for the Hub."""
    for name, value in hub.environment(Path("unused")).items():
        monkeypatch.setenv(name, value)
    # What huggingface_hub read from the environment when it was imported
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


def test_a_pipeline_is_pushed_whole(hub, tiny_checkpoint, tmp_path):
    code = f"""from transformers import pipeline
segment = pipeline("video-segmentation", model={str(tiny_checkpoint)!r})
segment.save_pretrained("saved", push_to_hub=True, repo_id="user/saved")"""
    done = python(hub, tmp_path / "home", "-c", USE_PACKAGE + code)
    assert done.returncode == 0, done.stderr
    saved = {path.name for path in (tmp_path / "home" / "saved").iterdir() if path.is_file()}
    assert "processor_config.json" in saved and saved - {"README.md"} <= hub.repos["models/user/saved"].keys()


def test_push_again_replaces(hub, use_hub, tiny_checkpoint):
    """And a checkpoint that says nothing about itself gets a card that says so."""
    for _ in range(2):
        assert push_checkpoint(tiny_checkpoint, "user/ausm-base") == f"{hub.url}/user/ausm-base"
        files = dict(hub.repos["models/user/ausm-base"])
        hub.repos["models/user/ausm-base"] |= {"README.md": b"old", "mine.txt": b"mine"}
    assert files.pop("mine.txt") == b"mine"
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results is None and card.data.license is None
    assert "Nothing has been measured." in card.text and "does not say how it was trained" in card.text


@pytest.mark.parametrize(
    ("repo_id", "folder", "results", "message"),
    [
        ("too/many/slashes", ".", [], "too/many/slashes"),
        ("user/name", "missing", [], "missing' can't be loaded"),
        ("user/name", ".", ["missing.json"], "missing.json' can't be read: wanted is a results.json"),
        ("user/name", ".", ["config.json"], "config.json' can't be read: wanted is a results.json"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_anything_is_sent(
    hub, use_hub, tiny_checkpoint, repo_id, folder, results, message
):
    with pytest.raises(ValueError, match=message):
        push_checkpoint(tiny_checkpoint / folder, repo_id, [tiny_checkpoint / name for name in results])
    assert not hub.repos


def test_results_of_another_checkpoint_are_refused(hub, use_hub, run, tmp_path):
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    for dtype in ("float32", "bfloat16"):  # a fingerprint is of the weights as they were loaded
        content["settings"] |= {"dtype": dtype, "weights": fingerprint(*load_model(run / "final", "cpu", dtype))}
        path.write_text(json.dumps(content))
        push_checkpoint(run / "final", f"user/{dtype}", [path])
        assert (
            "| davis2017 | val | prompted | J&F | J | 10.0 |"
            in hub.repos[f"models/user/{dtype}"]["README.md"].decode()
        )
    model, processor = load_model(run / "final", "cpu")
    with torch.no_grad():
        model.class_heads["pets"].bias.add_(1)
    content["settings"] |= {"dtype": "float32", "weights": fingerprint(model, processor)}
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match="results.json' are of other weights .* wanted is what `ausm evaluate --model"
    ):
        push_checkpoint(run / "final", "user/other", [path])
    assert "models/user/other" not in hub.repos


def test_a_model_is_the_same_wherever_and_by_whom_it_was_stored(tiny_checkpoint, tmp_path):
    model, processor = load_model(tiny_checkpoint, "cpu")
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((tmp_path / "copy/config.json").read_text())
    config |= {"transformers_version": "5.0.0", "architectures": None, "auto_map": {"AutoConfig": "a.B"}}
    config["backbone_config"]["dtype"] = "bfloat16"
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    same = fingerprint(*load_model(tmp_path / "copy", "cpu"))
    assert same == fingerprint(model, processor)
    model.config.max_age += 1
    assert same != fingerprint(model, processor)


def test_the_card_says_which_part_of_a_split_was_scored(hub, use_hub, run, tmp_path):
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    content["settings"]["videos"] = 3
    path.write_text(json.dumps({**content, "not_scored": ["b"]}))
    push_checkpoint(run / "final", "user/part", [path])
    assert "| davis2017 | val (2 of 3 videos) |" in hub.repos["models/user/part"]["README.md"].decode()


def test_the_recipe_beside_the_working_folder_is_found(hub, use_hub, run, monkeypatch):
    monkeypatch.chdir(run / "final")
    push_checkpoint(".", "user/here")
    assert "| steps | 123 |" in hub.repos["models/user/here"]["README.md"].decode()


@pytest.mark.parametrize("text", ["servings: 4", "model: {preset: nano, path: null}", "- egg", "", "a: [", "\0"])
def test_some_other_recipe_says_nothing_about_training(hub, use_hub, run, text):
    (run / "recipe.yaml").write_text(text)
    push_checkpoint(run / "final", "user/name")
    card = hub.repos["models/user/name"]["README.md"].decode()
    assert "The checkpoint does not say how it was trained." in card
