"""`ImageProcessingTestMixin` and `ProcessorTesterMixin` of transformers."""

import unittest
from unittest import mock

import pytest

from ausm_hf import AusmImageProcessor, AusmProcessor

pytest.importorskip("transformers_tests", reason="transformers' tests are not in this environment; see fetch.py")
from transformers_tests import test_image_processing_common as images  # noqa: E402
from transformers_tests import test_processing_common as processing  # noqa: E402


class AusmImageProcessingTester(images.ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(
            parent,
            batch_size=3,
            size={"height": 64, "width": 96},
            size_divisor=32,
            do_resize=True,
            do_normalize=True,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.5, 0.4, 0.3],
        )

    def _get_image_processing_classes(self):
        return {"pil": AusmImageProcessor}


class AusmImageProcessingTest(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = AusmImageProcessingTester
    test_cast_dtype = True

    @unittest.skip("Frames are always made RGB.")
    def test_image_processor_from_dict_with_kwargs_has_attributes(self):
        pass

    @unittest.skip("Frames have three channels when they come out; a fourth is dropped.")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("It needs no torchvision: tensors are resized by torch itself.")
    def test_new_models_require_torchvision_backend(self):
        pass


class AusmProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = AusmProcessor

    @classmethod
    def _setup_image_processor(cls):
        return AusmImageProcessor(size={"height": 64, "width": 96})

    @classmethod
    def setUpClass(cls):
        # These suites know no classes whose code travels with what they save.
        for travelling in (AusmImageProcessor, AusmProcessor):
            at_home = mock.patch.object(travelling, "_auto_class", None)
            at_home.start()
            cls.addClassCleanup(at_home.stop)
        super().setUpClass()

    @unittest.skip("There is no text.")
    def test_flat_kwarg_applied_when_modality_dict_lacks_it(self):
        pass

    @unittest.skip("`return_tensors` stands in the signature, for `help` to show it.")
    def test_call_arguments_not_in_processor_kwargs(self):
        pass
