"""`BackboneTesterMixin` of transformers on the small backbone."""

import unittest

import pytest
from tiny_backbones import TINY_LITE

from ausm_hf import EfficientNetLiteBackbone, EfficientNetLiteConfig

pytest.importorskip("transformers_tests", reason="transformers' tests are not in this environment; see fetch.py")
from transformers_tests import test_backbone_common as backbone  # noqa: E402
from transformers_tests import test_modeling_common as common  # noqa: E402


class EfficientNetLiteTester:
    batch_size = 2

    def prepare_config_and_inputs_for_common(self):
        config = EfficientNetLiteConfig(
            **{name: value for name, value in TINY_LITE.items() if name != "model_type"},
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
