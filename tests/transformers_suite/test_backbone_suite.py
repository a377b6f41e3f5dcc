"""`BackboneTesterMixin` of transformers on the small backbone."""

import unittest

import pytest

from ausm_hf import EfficientNetLiteBackbone, EfficientNetLiteConfig

pytest.importorskip("transformers_tests", reason="transformers' tests are not in this environment; see fetch.py")
from transformers_tests import test_backbone_common as backbone  # noqa: E402
from transformers_tests import test_modeling_common as common  # noqa: E402


class EfficientNetLiteTester:
    batch_size = 2

    def prepare_config_and_inputs_for_common(self):
        config = EfficientNetLiteConfig(
            stem_width=8,
            widths=[8, 8, 16, 16, 16],
            depths=[1, 1, 1, 1, 1],
            kernel_sizes=[3, 3, 3, 3, 3],
            strides=[1, 2, 2, 2, 2],
            expand_ratios=[1, 2, 2, 2, 2],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        return config, {"pixel_values": common.floats_tensor([self.batch_size, 3, 64, 64])}


class EfficientNetLiteBackboneTest(backbone.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (EfficientNetLiteBackbone,)
    config_class = EfficientNetLiteConfig
    has_attentions = False

    def setUp(self):
        self.model_tester = EfficientNetLiteTester()

    @unittest.skip("Its depths count blocks per group, of which several make one stage.")
    def test_config(self):
        pass
