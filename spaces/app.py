"""The Space. `AUSM_MODEL` (a variable of the Space) names a checkpoint on the Hub; without it, it is ausm-nano."""

import os

options = {}
if os.environ.get("SPACES_ZERO_GPU"):
    # GPUs are lent for one call at a time. This import has to come before torch's. A camera's stream outlives a call.
    import spaces

    options = {"on_gpu": spaces.GPU, "webcam": False}

from ausm_hf.demo.launch import launch  # noqa: E402

launch(model=os.environ.get("AUSM_MODEL"), **options)
