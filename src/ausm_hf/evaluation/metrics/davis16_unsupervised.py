"""J&F of DAVIS 2016 unsupervised (one primary object, nobody says which), as an `evaluate` module."""

from .jf import DataSetScorer, summarize
from .streaming import StreamingMetric, info_of_masks

_DESCRIPTION = """
J, F and J&F of DAVIS 2016 unsupervised: the primary object or group against the rest, with no prompt. Everything that
is predicted counts as one object, and every non-zero pixel of ground truth as the true one. As in the DAVIS 2016
toolkit, the first and last frame of each sequence are left out, and every sequence weighs the same. Frames are reduced
to numbers as they come: no video is kept.
"""

_INPUTS = """
Args:
    predictions: masks (H, W), numpy arrays of bools or integers, 0 = background: one per frame, in order. Ids may be
        anything; they are united.
    references: true masks, likewise; non-zero = object (DAVIS 2016 stores 255).
    sequence: for each frame, the name of its sequence.
    skip_first, skip_last (`compute` only): whether to leave out the first and last frame of each sequence. Default:
        True, as the DAVIS 2016 toolkit does; some later evaluations don't.
Returns:
    J&F, J, J_recall, J_decay, F, F_recall, F_decay: fractions of 1, means over sequences.
    sequences: the same for each sequence.
Example:
    >>> import numpy as np
    >>> masks = [np.array([[0, 255], [0, 255]])] * 3
    >>> metric.add_batch(predictions=masks, references=masks, sequence=["bear"] * 3)
    >>> metric.compute()["J&F"]
    1.0
"""

_CITATION = """
@inproceedings{Perazzi2016,
  author    = {F. Perazzi and J. Pont-Tuset and B. McWilliams and L. {Van Gool} and M. Gross and A. Sorkine-Hornung},
  title     = {A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation},
  booktitle = {Computer Vision and Pattern Recognition},
  year      = {2016}
}
"""


class Davis16Unsupervised(StreamingMetric):
    """J&F per sequence and data set, everything predicted against the primary object."""

    def _info(self):
        return info_of_masks(_DESCRIPTION, _INPUTS, _CITATION, "https://davischallenge.org/davis2016/code.html")

    def _start(self):
        self._scorer = DataSetScorer("union")

    def _add_frame(self, predictions, references, sequence):
        self._scorer.add(sequence, predictions, references)

    def _result(self, skip_first=True, skip_last=True):
        return summarize(self._scorer.result(skip_first, skip_last, "start"))
