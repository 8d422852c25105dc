"""Evaluation: scores against other implementations, absent classes, intervals."""
import json
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

from spectralmoe.simulator.tiles import build_tiles
from spectralmoe.datasets import DomainDataModule
from spectralmoe.evaluation import Scores, evaluate, interval, paired, plot_confusion, score_table

NAMES = ("field", "forest", "water", "road")


class Lookup(nn.Module):
    "Predicts what the first band says."
    def __init__(self):
        super().__init__()
        self.anchor, self.inner = nn.Parameter(torch.zeros(1)), nn.Dropout().eval()
        self.seen = []

    def predict(self, images):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return images[:, 0].round().long()


def batch(labels, predictions): return {"image": predictions[:, None].float(), "label": labels}


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (6, 32, 32), generator=generator)
    wrong = torch.rand(labels.shape, generator=generator) < 0.3
    predictions = torch.where(wrong, torch.randint(4, labels.shape, generator=generator), labels)
    labels[:, :4] = 255
    return labels, predictions


def test_scores_equal_torchmetrics(maps):
    labels, predictions = maps
    scores = evaluate(Lookup(), [batch(l[None], p[None]) for l, p in zip(labels, predictions)], NAMES)
    assert scores.miou == pytest.approx(MulticlassJaccardIndex(4, ignore_index=255)(predictions, labels).item())
    assert scores.mf1 == pytest.approx(MulticlassF1Score(4, ignore_index=255)(predictions, labels).item())
    known = labels != 255
    assert scores.oa == pytest.approx((labels == predictions)[known].float().mean().item())
    assert scores.n_pixels == known.sum() and scores.absent == ()


def test_absent_class_is_named_and_left_out():
    labels, predictions = torch.tensor([[[0, 0, 1, 1, 1, 255]]]), torch.tensor([[[0, 3, 1, 1, 1, 2]]])
    scores = evaluate(Lookup(), [batch(labels, predictions)], NAMES)
    assert scores.absent == ("water", "road")
    assert scores.miou == pytest.approx((1 / 2 + 1) / 2)  # the pixel given to "road" is missing from "field"
    assert scores.iou[2:].isnan().all() and "absent and left out: water, road" in repr(scores)
    assert scores.to_dict()["iou"]["road"] is None
    assert score_table(scores).loc["road", "predicted"] == 1


def test_record_brings_the_scores_back(maps):
    scores = evaluate(Lookup(), [batch(*maps)], NAMES)
    again = Scores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert again.to_dict() == scores.to_dict()
    assert torch.equal(again.confusion, scores.confusion)


def test_label_outside_the_classes_is_refused(maps):
    labels, predictions = maps
    with pytest.raises(RuntimeError, match="4"):
        evaluate(Lookup(), [batch(labels.clamp(max=254).where(labels != 0, torch.tensor(4)), predictions)], NAMES)


def test_model_is_handed_back_as_it_came(maps):
    model = Lookup().train()
    model.inner.eval()
    evaluate(model, [batch(*maps)], NAMES)
    assert model.seen == [(False, False)]
    assert model.training and not model.inner.training
    with pytest.raises(ValueError, match="no pixel is labelled"):
        evaluate(model, [batch(torch.full_like(maps[0], 255), maps[1])], NAMES)
    assert model.training and not model.inner.training


def test_every_labelled_pixel_of_a_domain_counts_once():
    data = DomainDataModule(build_tiles("made_tiles"), crop=40)  # windows that do not fit the tiles
    model = Lookup()
    model.predict = lambda images: torch.zeros_like(images[:, 0]).long()
    scores = evaluate(model, data.target_dataloaders()["target"], data.benchmark.classes)
    counts = sum(torch.bincount(tile["label"][tile["label"] != 255], minlength=5) for tile in data.targets["target"])
    assert scores.confusion.sum(1).tolist() == counts.tolist()


def test_interval_is_students(maps):
    values = [0.61, 0.64, 0.58, 0.62]
    mean, half = interval(values, level=0.9)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    with pytest.warns(UserWarning, match="run more seeds"): mean, half = interval([0.5])
    assert mean == 0.5 and math.isnan(half)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [[0.5, 0.6]]])
def test_interval_refuses_what_is_no_score(values):
    with pytest.raises(ValueError, match="one finite number per seed"): interval(values)


def test_pairing_uses_the_seeds_not_the_order():
    a, b = {0: 0.50, 1: 0.60, 2: 0.70}, {2: 0.69, 0: 0.49, 1: 0.58}
    found = paired(a, b)
    low, high = stats.ttest_rel([0.50, 0.60, 0.70], [0.49, 0.58, 0.69]).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_figure_has_a_row_per_class_that_is_there():
    figure = plot_confusion(Scores(torch.tensor([[5, 1, 0], [0, 0, 0], [0, 2, 2]]), ("a", "b", "c")))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label.split(" ")[0] for label in labels] == ["a", "c"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
