"""The demo's pages, served by this process."""

import os
from pathlib import Path

import pytest
import torch

from ausm_hf.video import VideoWriter


@pytest.fixture(scope="session")
def clip_file(moving_square, tmp_path_factory) -> Path:
    """`square.mp4`: the moving square, 48 x 64 pixels, six frames, 10 per second."""
    path = tmp_path_factory.mktemp("clips") / "square.mp4"
    with VideoWriter(path, 10, (48, 64)) as writer:
        for frame in moving_square[0]:
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def serve(tiny_checkpoint):
    """A function that starts the demo and returns its `gradio.Blocks`. Closed at the end of the module."""
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    from PIL import Image

    from ausm_hf.demo.launch import launch

    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_SERVER_PORT")}
    most_pixels, pages = Image.MAX_IMAGE_PIXELS, []
    os.environ.pop("GRADIO_SERVER_PORT", None)

    def start(model=tiny_checkpoint, **options):
        pages.append(launch(model, device="cpu", wait=False, **options))
        return pages[-1]

    yield start
    for page in pages:
        page.close()
    Image.MAX_IMAGE_PIXELS = most_pixels
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


class SignalsAreMasks:
    """In place of a network: what is marked is what there is."""

    label_sets = {"pets": ["cat", "dog"]}

    def refine(self, frame, prompts, known):
        size = frame.shape[:2]
        before = [None if mask is None else torch.from_numpy(mask) for mask in known]
        return [prompt.signal(size, mask).numpy() for prompt, mask in zip(prompts, before)]


@pytest.fixture
def signals_are_masks():
    return SignalsAreMasks()
