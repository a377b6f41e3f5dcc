"""The Space. `AUSM_MODEL` (a variable of the Space) names a checkpoint on the Hub; without it, it is ausm-nano."""

import os

options = {}
if os.environ.get("SPACES_ZERO_GPU"):
    # GPUs are lent for one call at a time. This import has to come before torch's. A camera's stream outlives a call.
    import spaces

    def seconds(what, *_, masks=None, backward=False, **__):
        """For how long: a frame or a clip. Short loans are granted sooner, and visitors have few minutes a day."""
        frames = getattr(what, "num_frames", 1) + (max(masks) if masks and backward else 0)
        return min(120, 30 + frames // 10)

    options = {"on_gpu": spaces.GPU(duration=seconds), "webcam": False}

from ausm_hf.demo.launch import launch  # noqa: E402

launch(model=os.environ.get("AUSM_MODEL"), **options)
