"""Auto classes, from a clean process with an empty cache: with the package, and with nothing but the saved code."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ausm_hf
from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmModel, AusmProcessor
from ausm_hf._register import BUNDLED_CHECKPOINT


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, tmp_path_factory):
    """Inputs, and what this process makes of them, in a file for the other process to compare with."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    model = AusmForUniversalSegmentation.from_pretrained(tiny_checkpoint).eval()
    pixel_values = AusmProcessor.from_pretrained(tiny_checkpoint)(videos=frames)["pixel_values_videos"]
    with torch.no_grad():
        output = model(pixel_values)
        bare = AusmModel.from_pretrained(tiny_checkpoint).eval()(pixel_values)
    path = tmp_path_factory.mktemp("expected") / "expected.npz"
    np.savez(
        path,
        frames=frames,
        masks=output.masks_queries_logits.numpy(),
        classes=output.class_queries_logits.numpy(),
        foreground=output.foreground_queries_logits.numpy(),
        bare=bare.query_hidden_states.numpy(),
    )
    return path


COMPARE = """
import sys
import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForUniversalSegmentation, AutoProcessor, pipeline

torch.set_num_threads(THREADS)  # bit for bit: sums in the same order
expected = np.load(EXPECTED)
options = OPTIONS
processor = AutoProcessor.from_pretrained(FOLDER, **options)
assert type(processor).__name__ == "AusmProcessor"
assert type(AutoImageProcessor.from_pretrained(FOLDER, **options)).__name__ == "AusmImageProcessor"
pixel_values = processor(videos=expected["frames"])["pixel_values_videos"]
with torch.no_grad():
    output = AutoModelForUniversalSegmentation.from_pretrained(FOLDER, **options).eval()(pixel_values)
    bare = AutoModel.from_pretrained(FOLDER, **options).eval()(pixel_values)
assert (output.masks_queries_logits.numpy() == expected["masks"]).all()
assert (output.class_queries_logits.numpy() == expected["classes"]).all()
assert (output.foreground_queries_logits.numpy() == expected["foreground"]).all()
assert (bare.query_hidden_states.numpy() == expected["bare"]).all()
segment = pipeline("video-segmentation", model=FOLDER, device="cpu", **options)
results = segment(expected["frames"], threshold=0.0)
assert len(results) == 3 and results[0][0]["mask"].size == (64, 48)
print(type(segment).__module__, type(segment.model).__module__, sorted(m for m in sys.modules if m == "ausm_hf"))
"""


def run(code: str, folder, expected, options: dict, cwd) -> str:
    for name, value in {"EXPECTED": str(expected), "FOLDER": str(folder), "OPTIONS": options}.items():
        code = code.replace(name, repr(value))
    code = code.replace("THREADS", str(torch.get_num_threads()))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("HF_")}
    environment |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("saved", ["by the pipeline", "one by one"])
def test_remote_code_without_the_package(tiny_checkpoint, expected, hide_package, saved, tmp_path):
    folder = tmp_path / "downloaded-model"
    if saved == "by the pipeline":
        shutil.copytree(tiny_checkpoint, folder)
    else:
        model = AusmForUniversalSegmentation.from_pretrained(tiny_checkpoint)
        vars(model.config).pop("custom_pipelines")
        model.config = AusmConfig.from_dict(model.config.to_dict())
        model.save_pretrained(folder)
        AusmProcessor.from_pretrained(tiny_checkpoint).save_pretrained(folder)
    code = hide_package + COMPARE
    printed = run(code, folder, expected, {"trust_remote_code": True}, tmp_path)
    pipeline_module, model_module, package = printed.split(maxsplit=2)
    assert pipeline_module.startswith("transformers_modules.") and pipeline_module.endswith(".pipeline_ausm")
    assert model_module.startswith("transformers_modules.") and model_module.endswith(".modeling_ausm")
    assert package == "[]"


def test_local_code_with_the_package(tiny_checkpoint, expected, tmp_path):
    source = str(Path(ausm_hf.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r}); import ausm_hf" + COMPARE
    printed = run(code, tiny_checkpoint, expected, {}, tmp_path)
    assert printed == "ausm_hf.model.pipeline_ausm ausm_hf.model.modeling_ausm ['ausm_hf']"


def test_model_code_needs_nothing_of_the_package(tiny_checkpoint):
    """Every file of `model/` that the network needs was saved along, and none reaches out of its folder."""
    saved = {path.name for path in tiny_checkpoint.glob("*.py")}
    assert {"modeling_ausm.py", "configuration_ausm.py", "processing_ausm.py", "pipeline_ausm.py"} <= saved
    allowed = {
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "scipy",
        "huggingface_hub",
        "safetensors",
        "triton",
        "mamba_ssm",
        "causal_conv1d",
        "av",
    }
    for path in tiny_checkpoint.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                assert node.level == 1 and f"{node.module}.py" in saved
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= allowed | sys.stdlib_module_names
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForUniversalSegmentation"}


def test_model_saved_by_itself_loads_with_remote_code(tiny_config, tmp_path):
    """As a training run saves it: without a pipeline."""
    config = tiny_config.to_dict()
    config.pop("auto_map", None)
    AusmForUniversalSegmentation(AusmConfig.from_dict(config)).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForUniversalSegmentation"] == "modeling_ausm.AusmForUniversalSegmentation"
    assert auto_map["AutoModel"] == "modeling_ausm.AusmModel"
    assert (tmp_path / "temporal_mamba.py").is_file()


IN_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from transformers import AutoModelForUniversalSegmentation, AutoProcessor, pipeline
import ausm_hf
tasks = {
    "model": lambda _: AutoModelForUniversalSegmentation.from_pretrained(sys.argv[2]),
    "processor": lambda _: AutoProcessor.from_pretrained(sys.argv[2]),
    "pipeline": lambda _: pipeline("video-segmentation", sys.argv[2]),
}
with ThreadPoolExecutor(3) as threads:
    print(*{type(made).__name__ for made in threads.map(tasks[sys.argv[1]], range(3))})
"""


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("model", "AusmForUniversalSegmentation"),
        ("processor", "AusmProcessor"),
        ("pipeline", "VideoSegmentationPipeline"),
    ],
)
def test_threads_that_load_at_once(tiny_checkpoint, what, name):
    command = [sys.executable, "-c", IN_THREADS, what, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [name]


def test_backbone():
    from transformers import AutoBackbone, AutoConfig

    backbone = AutoBackbone.from_config(AutoConfig.for_model("efficientnet_lite"))
    assert type(backbone).__name__ == "EfficientNetLiteBackbone"


def test_config_round_trip(tmp_path):
    config = AusmConfig.from_preset("nano")
    config.save_pretrained(tmp_path)
    assert AusmConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_the_preset_is_what_the_checkpoint_of_its_name_is():
    preset, checkpoint = AusmConfig.from_preset("nano"), AusmConfig.from_pretrained(BUNDLED_CHECKPOINT)
    assert {k: v.shape for k, v in shapes(preset).items()} == {k: v.shape for k, v in shapes(checkpoint).items()}
    of_training = {"class_weight", "importance_sampling", "train_num_points"}
    of_saving = {"architectures", "dtype"}
    preset, checkpoint = preset.to_dict(), checkpoint.to_dict()
    preset["backbone_config"]["dtype"] = checkpoint["backbone_config"]["dtype"]
    differ = {name for name in preset | checkpoint if preset.get(name) != checkpoint.get(name)}
    assert differ == of_training | of_saving


def shapes(config):
    with torch.device("meta"):
        return AusmForUniversalSegmentation(config).state_dict()
