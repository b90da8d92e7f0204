"""Accuracy: counts, percentages, classes that do not occur, bad predictions."""
import pytest
import torch

from ewa3d.evaluation import Accuracy
from ewa3d.registry import METRICS
from ewa3d.structures import Sample


def samples(truth, guess):
    return [dict(gt_label=torch.tensor(t), pred_label=torch.tensor(g), name=f's{i}')
            for i, (t, g) in enumerate(zip(truth, guess))]


def evaluate(truth, guess, classes=('a', 'b', 'c'), batch=2):
    metric = Accuracy()
    metric.dataset_meta = dict(classes=classes) if classes else {}
    data = samples(truth, guess)
    for i in range(0, len(data), batch):
        metric.process(None, data[i:i + batch])
    return metric.evaluate(len(data))


def test_against_a_count_by_hand():
    metrics = evaluate([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0])
    assert metrics['OA'] == pytest.approx(100 * 4 / 6)
    assert metrics['mAcc'] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert metrics['acc/a'] == pytest.approx(200 / 3) and metrics['acc/b'] == 100 and metrics['acc/c'] == 0
    assert all(type(v) is float for v in metrics.values())


def test_against_a_naive_twin():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 7, (500,), generator=generator)
    guess = torch.where(torch.rand(500, generator=generator) < 0.6, truth, torch.randint(0, 7, (500,)))
    metrics = evaluate(truth.tolist(), guess.tolist(), [str(i) for i in range(7)], batch=33)
    assert metrics['OA'] == pytest.approx(100 * float((truth == guess).double().mean()))
    recall = [float((guess[truth == c] == c).double().mean()) for c in range(7)]
    assert metrics['mAcc'] == pytest.approx(100 * sum(recall) / 7)


def test_batching_does_not_matter_and_evaluate_starts_again():
    truth, guess = [0, 1, 2, 1], [0, 1, 1, 1]
    assert evaluate(truth, guess, batch=1) == evaluate(truth, guess, batch=4)
    metric = Accuracy(num_classes=3)
    for _ in range(2):
        metric.process(None, samples(truth, guess))
        assert metric.evaluate(4)['OA'] == 75


def test_classes_that_do_not_occur_are_left_out():
    metrics = evaluate([0, 0, 1], [0, 2, 1], classes=('a', 'b', 'c', 'd'))
    assert metrics['mAcc'] == pytest.approx(75) and 'acc/c' not in metrics and 'acc/d' not in metrics


def test_without_class_names():
    assert evaluate([0, 3], [0, 1], classes=None) == {'OA': 50.0, 'mAcc': 50.0, 'acc/0': 100.0, 'acc/3': 0.0}


def test_scores_and_samples():
    metric = METRICS.build(dict(type='Accuracy', prefix='cls'))
    sample = Sample(gt_label=torch.tensor(1), pred_scores=torch.tensor([0.2, 0.5, 0.3]), metainfo=dict(name='x'))
    metric.process(None, [sample.to_dict()])
    assert metric.evaluate(1) == {'cls/OA': 100.0, 'cls/mAcc': 100.0, 'cls/acc/1': 100.0}


def test_bad_input():
    metric = Accuracy(num_classes=3)
    with pytest.raises(ValueError, match='nothing to evaluate'):
        metric.evaluate(0)
    bad = dict(gt_label=torch.tensor(0), pred_scores=torch.tensor([float('nan'), 1, 0]), name='chair_7')
    with pytest.raises(ValueError, match=r"'chair_7' are not finite"):
        metric.process(None, [bad])
    with pytest.raises(KeyError, match='gt_label'):
        metric.process(None, [dict(name='x')])
    for truth, guess in ((3, 0), (0, 3), (-1, 0)):
        with pytest.raises(ValueError, match='outside of 0'):
            metric.process(None, samples([truth], [guess]))
    metric.process(None, samples([0, 1, 2], [0, 1, 2]))
    with pytest.raises(ValueError, match='round_up=False'):
        metric.evaluate(2)
