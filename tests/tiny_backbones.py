"""Backbones of a few thousand parameters, as `backbone_config`."""

TINY_LITE = {
    "model_type": "efficientnet_lite",
    "stem_width": 8,
    "widths": [8, 8, 16, 16, 16],
    "depths": [1, 1, 1, 1, 1],
    "kernel_sizes": [3, 3, 3, 3, 3],
    "strides": [1, 2, 2, 2, 2],
    "expand_ratios": [1, 2, 2, 2, 2],
}

TINY_SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
