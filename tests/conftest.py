"""Fixtures that several test files share."""

import threading
from os import environ
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_double import HubDouble
from tiny_backbones import TINY_LITE

if not torch.cuda.is_available():
    environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which many modules may do

# Tiny tensors gain nothing from more threads, and lose much where other programs want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def hide_package() -> str:
    """Code for the start of a program that stands for "the package is not installed", whichever way it is."""
    return """
import sys
class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "ausm_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden)
"""


@pytest.fixture
def five_threads():
    """Torch computes with five threads, not with one as in all other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoding_threads(monkeypatch, tiny_model):
    """In which thread each frame is encoded that `tiny_model` sees."""
    threads = []
    encode_frames = tiny_model.encode_frames

    def keep(pixel_values):
        threads.append(threading.current_thread())
        return encode_frames(pixel_values)

    monkeypatch.setattr(tiny_model, "encode_frames", keep)
    return threads


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real videos and true masks, from AUSM_SHARED_DATA or beside the repository."""
    folder = Path(environ.get("AUSM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"there is no data in {folder}; set AUSM_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_config():
    """A network of a few thousand parameters with four ID vectors and two labels."""
    from ausm_hf import AusmConfig

    return AusmConfig.from_preset(
        "nano",
        backbone_config=TINY_LITE,
        hidden_size=32,
        mask_feature_size=16,
        mask_refinement_layers=2,
        num_compressor_layers=1,
        num_history_decoder_layers=1,
        num_decoder_layers=1,
        history_feedforward_size=32,
        mask_propagation_radius=2,
        remember_appearance=True,
        decoder_feedforward_size=32,
        num_id_vectors=4,
        num_detection_queries=5,
        label_sets={"pets": ["cat", "dog"]},
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """The network of `tiny_config` with fixed random weights."""
    from ausm_hf import AusmForUniversalSegmentation

    torch.manual_seed(1)
    return AusmForUniversalSegmentation(tiny_config).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory) -> Path:
    """A saved folder of `tiny_model`: weights, processor, pipeline and the code of all three."""
    from ausm_hf import AusmImageProcessor, AusmProcessor, VideoSegmentationPipeline

    folder = tmp_path_factory.mktemp("checkpoint") / "ausm-tiny-random"
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}))
    VideoSegmentationPipeline(tiny_model, processor=processor, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moving_square() -> tuple[np.ndarray, np.ndarray]:
    """Six frames (6, 48, 64, 3) of a bright square that moves over a dark ground, and its mask in each (6, 48, 64)."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 60, (6, 48, 64, 3), dtype=np.uint8)
    masks = np.zeros((6, 48, 64), dtype=np.uint8)
    for t in range(6):
        masks[t, 12:30, 8 + 4 * t : 26 + 4 * t] = 1
    frames[masks == 1] += 180
    return frames, masks


@pytest.fixture
def hub():
    """A stand-in for the Hub, empty; see `hub_double.py` beside this file."""
    with HubDouble() as double:
        yield double
