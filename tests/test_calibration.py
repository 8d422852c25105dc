"Calibration: against torchmetrics, from the pass that scores, in records of any age."
import math

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from spectralmoe.evaluation import Calibration, Scores, count_pixels, evaluate, plot_reliability, sort_by_confidence
from spectralmoe.reporting.tables import pooled_scores

NAMES = ("field", "forest", "water", "road")


class Given(nn.Module):
    "Probabilities are the image."
    def __init__(self):
        super().__init__()
        self.anchor, self.passes = nn.Parameter(torch.zeros(1)), 0

    def probabilities(self, images):
        self.passes += 1
        return images

    def predict(self, images): return self.probabilities(images).argmax(1)


def domain(seed, n=6, wrong=0.3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n, 16, 16), generator=g)
    scores = 2 * torch.randn(n, 4, 16, 16, generator=g) + 3 * nn.functional.one_hot(labels, 4).movedim(-1, 1)
    labels[torch.rand(labels.shape, generator=g) < wrong] = 2
    labels[:, :3] = 255
    return scores.softmax(1), labels


def batches(seed, size=2):
    images, labels = domain(seed)
    return [{"image": images[i:i + size], "label": labels[i:i + size]} for i in range(0, len(images), size)]


def test_error_equals_torchmetrics_and_the_confusion_matrix_is_that_of_predict():
    images, labels = domain(0)
    model = Given()
    scores = evaluate(model, batches(0), NAMES)
    assert model.passes == 3, "one forward pass per batch"
    assert scores.calibration.ece == pytest.approx(MulticlassCalibrationError(4, n_bins=15, norm="l1", ignore_index=255)(images, labels).item(), abs=1e-6)
    assert sum(scores.calibration.pixels) == scores.n_pixels
    assert sum(scores.calibration.right) / scores.n_pixels == pytest.approx(scores.oa)
    assert torch.equal(scores.confusion, count_pixels(model, batches(0), 4, calibrated=False)[0])
    assert "ECE" in repr(scores) and scores.calibration.ece > 0.01


def test_a_record_brings_the_bins_back_and_domains_are_pooled():
    near, far = (evaluate(Given(), batches(s), NAMES).to_dict() for s in (0, 1))
    assert Scores.from_dict(near).to_dict() == near
    together = pooled_scores([near, far])
    both = evaluate(Given(), batches(0) + batches(1), NAMES)
    assert together["ece"] == pytest.approx(both.calibration.ece) and together["confusion"] == both.to_dict()["confusion"]


def test_older_records_have_none():
    new, old = (evaluate(Given(), batches(s), NAMES).to_dict() for s in (0, 1))
    for key in ("ece", "calibration"): del old[key]
    again = Scores.from_dict(old)
    assert again.calibration is None and again.to_dict() == old and "ECE" not in repr(again)
    assert "ece" not in pooled_scores([new, old]) and pooled_scores([new, old])["miou"] > 0


def test_a_model_without_probabilities_is_scored_as_before():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def predict(self, images): return images.argmax(1)
    scores = evaluate(Classes(), batches(0), NAMES)
    assert scores.calibration is None and set(scores.to_dict()) & {"ece", "calibration"} == set()


def test_nothing_labelled_and_borders():
    assert math.isnan(Calibration.of([sort_by_confidence(torch.zeros(0), torch.zeros(0, dtype=torch.bool))]).ece)
    edges = sort_by_confidence(torch.tensor([0.0, 1 / 15, 0.5, 1.0]), torch.ones(4, dtype=torch.bool))
    assert edges[0].sum() == 4 and edges[0, -1] == 1 and edges[0, 0] == 1
    assert len(plot_reliability({"a": Calibration.of([edges])}).axes[0].lines) == 2


@pytest.mark.parametrize("method", ["raw_conv", "frozen"])
def test_a_segmentor_is_scored_by_its_probabilities(method):
    "A light head's are a softmax, a Mask2Former's are shares of its scores; either way the classes are those of `predict`."
    from spectralmoe.runs import PROFILES, load_data
    from spectralmoe.segmentor import Segmentor
    if not hasattr(Segmentor, "probabilities"): pytest.skip("this Segmentor gives no probabilities yet: its records say nothing of calibration")
    p, data = PROFILES["smoke"], load_data("smoke", "made_tiles")
    model = Segmentor.build("made_tiles", p.vfm, None, method, head_sizes={} if method == "raw_conv" else p.head_sizes)
    found = evaluate(model, data.target_dataloaders()["target"])
    assert sum(found.calibration.pixels) == found.n_pixels and 0 <= found.calibration.ece <= 1
    assert torch.equal(found.confusion, count_pixels(model, data.target_dataloaders()["target"], len(found.classes), calibrated=False)[0])
