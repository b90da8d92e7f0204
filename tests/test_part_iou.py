"""PartIoU against loops that follow the definition, the published numbers, and what is refused."""
import numpy as np
import pytest
import torch

from ewa3d.evaluation_parts import PartIoU, predicted_parts, propagated_scores, shape_iou
from ewa3d.registry import METRICS

PARTS = dict(chair=[3, 0], lamp=[1, 2, 5], mug=[4])  # in no order, and not one after the other


def naive_iou(predicted, truth, ids):
    ious = []
    for part in ids:
        both = sum(p == part and t == part for p, t in zip(predicted, truth))
        either = sum(p == part or t == part for p, t in zip(predicted, truth))
        ious.append(both / either if either else 1.)
    return float(np.mean(ious))


def naive(samples, parts, key=('part_scores', 'gt_parts')):
    """Everything kept in lists, one point at a time."""
    ious, right, seen = {name: [] for name in parts}, {}, {}
    for sample in samples:
        name = list(parts)[int(sample['gt_label'])]
        ids = parts[name]
        predicted = [max(ids, key=lambda part: (float(row[part]), -ids.index(part))) for row in sample[key[0]]]
        truth = sample[key[1]].tolist()
        ious[name].append(naive_iou(predicted, truth, ids))
        for p, t in zip(predicted, truth):
            right[t], seen[t] = right.get(t, 0) + (p == t), seen.get(t, 0) + 1
    met = {name: values for name, values in ious.items() if values}
    return dict(instance_mIoU=100 * np.mean([value for values in met.values() for value in values]),
                category_mIoU=100 * np.mean([np.mean(values) for values in met.values()]),
                point_acc=100 * sum(right.values()) / sum(seen.values()),
                class_acc=100 * np.mean([right[part] / seen[part] for part in seen]),
                **{f'IoU/{name}': 100 * np.mean(values) for name, values in met.items()})


def sample(label, N=12, name='shape', **more):
    ids = torch.tensor(list(PARTS.values())[label])
    return dict(name=name, gt_label=torch.tensor(label), gt_parts=ids[torch.randint(len(ids), (N,))],
                part_scores=torch.randn(N, 6).log_softmax(-1), **more)


def metric(meta=PARTS, batches=(), **options):
    found = METRICS.build(dict(type='PartIoU', **options))
    found.dataset_meta = dict(parts={name: tuple(ids) for name, ids in meta.items()}) if meta else {}
    for batch in batches:
        found.process({}, batch)
    return found


def test_published_numbers(reference):
    ref = reference('partseg_metrics')
    order = ['Airplane', 'Bag', 'Cap', 'Car', 'Chair', 'Earphone', 'Guitar', 'Knife', 'Lamp', 'Laptop', 'Motorbike',
             'Mug', 'Pistol', 'Rocket', 'Skateboard', 'Table']
    parts = {name: ref.meta['config']['seg_classes'][name] for name in order}
    shapes = [dict(part_scores=scores, gt_parts=truth) for scores, truth in
              zip(ref.inputs['logits'], ref.inputs['part'])]  # the category follows from the parts
    found = metric(parts, [shapes[i:i + 7] for i in range(0, 36, 7)]).evaluate(36)
    for ours, theirs in dict(point_acc='accuracy', class_acc='class_avg_accuracy', category_mIoU='class_miou',
                             instance_mIoU='instance_miou').items():
        assert found[ours] == pytest.approx(100 * float(ref.expected[theirs]), abs=1e-10)
    categories = [found[f'IoU/{name}'] for name in order]
    assert categories == pytest.approx((100 * ref.expected['per_category_iou']).tolist(), abs=1e-10)
    one_by_one = [shape_iou(predicted_parts(s['part_scores'], ids), s['gt_parts'], ids) for ids in
                  ref.meta['config']['seg_classes'].values() for s in shapes if int(s['gt_parts'][0]) in ids]
    assert one_by_one == pytest.approx(ref.expected['per_shape_iou_by_category_order'].tolist(), abs=1e-12)


@pytest.mark.parametrize('labels', [(0, 1, 1, 2, 0), (1, 1), (0,)])
def test_naive_over_any_batches(labels):
    shapes = [sample(label, N=5 + i) for i, label in enumerate(labels)]
    expected = naive(shapes, PARTS)
    for size in (1, 2, 5):
        found = metric(batches=[shapes[i:i + size] for i in range(0, len(shapes), size)]).evaluate(9)
        assert found == pytest.approx(expected) and next(iter(found)) == 'instance_mIoU'


def test_a_part_that_is_in_neither_counts_as_one():
    ids, truth = [1, 2, 5], torch.tensor([1, 1, 1, 1])
    assert shape_iou(truth, truth, ids) == 1
    assert shape_iou(torch.tensor([1, 1, 2, 2]), truth, ids) == pytest.approx((0.5 + 0 + 1) / 3)


def test_predictions_are_parts_of_the_category():
    scores = torch.eye(6)[[4, 3, 1]] * 5 + torch.arange(6) / 10
    assert predicted_parts(scores, [1, 2, 5]).tolist() == [5, 5, 1]


def test_nothing_is_left_from_before():
    found = metric(batches=[[sample(0), sample(1)]])
    found.evaluate(2)
    again = [sample(1)]
    found.process({}, again)
    assert found.evaluate(1) == pytest.approx(naive(again, PARTS))


def test_streaming_keeps_counts_only():
    found = metric(batches=[[sample(0, N=1000)] * 3])
    assert found.sums.numel() == found.size() == 4 * (3 + 6) and found.results == []


def renamed(metrics):
    return {key.replace('IoU/', 'IoU_all/') if '/' in key else key + '_all': value for key, value in metrics.items()}


def test_all_points():
    all_points, rows = torch.randn(40, 3), torch.randperm(40)[:12]
    ids = torch.tensor(PARTS['lamp'])
    shape = sample(1, all_points=all_points, gt_all_parts=ids[torch.randint(3, (40,))], rows=rows)
    found = metric(batches=[[shape]]).evaluate(1)
    distance = torch.cdist(all_points.double(), all_points[rows].double()).square()
    near = distance.topk(3, largest=False)
    weight = 1 / (near.values + 1e-8)
    scores = (shape['part_scores'].exp()[near.indices] * (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)).sum(1)
    torch.testing.assert_close(propagated_scores(shape['part_scores'], all_points[rows], all_points), scores.float())
    expected = naive([dict(shape, scores=scores)], PARTS, ('scores', 'gt_all_parts'))
    assert {key: value for key, value in found.items() if '_all' not in key} == pytest.approx(naive([shape], PARTS))
    assert {key: value for key, value in found.items() if '_all' in key} == pytest.approx(renamed(expected))
    voted = dict(shape, all_part_scores=torch.rand(40, 6))
    expected = naive([voted], PARTS, ('all_part_scores', 'gt_all_parts'))
    found = metric(batches=[[voted]]).evaluate(1)
    assert {key: value for key, value in found.items() if '_all' in key} == pytest.approx(renamed(expected))


def test_all_points_that_are_the_given_ones():
    shape = sample(0)
    shape.update(all_points=torch.randn(12, 3), gt_all_parts=shape['gt_parts'], rows=torch.arange(12))
    found = metric(batches=[[shape]]).evaluate(1)
    assert found['instance_mIoU_all'] == found['instance_mIoU'] and found['point_acc_all'] == found['point_acc']
    for rows, error in ((None, KeyError), (torch.arange(11), ValueError), (torch.arange(12) + 1, ValueError)):
        wrong = {key: value for key, value in dict(shape, rows=rows).items() if value is not None}
        with pytest.raises(error, match=r"'shape'.* rows|'shape' needs 'rows'"):
            metric(batches=[[wrong]])


def test_means_are_over_what_occurs():
    found = metric(batches=[[sample(2), sample(2)]]).evaluate(2)
    assert found['class_acc'] == found['instance_mIoU'] == 100 and 'IoU/chair' not in found


def test_parts_may_be_given_and_names_prefixed():
    shape = sample(1)
    found = metric(None, [[shape]], parts=PARTS, prefix='val').evaluate(1)
    assert found == pytest.approx({f'val/{key}': value for key, value in naive([shape], PARTS).items()})


@pytest.mark.parametrize('change, error, message', [
    (dict(gt_parts=torch.tensor([1] * 11 + [3])), ValueError, r"is of the category 'lamp' with the parts .* 3$"),
    (dict(gt_parts=torch.ones(11).long()), ValueError, r"'shape' has 12 points and gt_parts of the shape \(11,\)"),
    (dict(gt_label=3), ValueError, "'shape' has the category 3; there are 3"),
    (dict(part_scores=torch.zeros(12, 5)), ValueError, r'part_scores must be \(N, 6\), got \(12, 5\)'),
    (dict(part_scores=torch.full((12, 6), float('nan'))), ValueError, "scores of sample 'shape' are not finite"),
    (dict(part_scores=None), KeyError, "sample 'shape' needs 'part_scores'"),
    (dict(gt_parts=None), KeyError, "sample 'shape' needs 'gt_parts'"),
    (dict(gt_label=None, gt_parts=torch.full((12,), 9)), ValueError, 'the part 9, which no category has')])
def test_samples_that_cannot_be(change, error, message):
    shape = {key: value for key, value in {**sample(1), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        metric(batches=[[shape]])


def test_what_cannot_be_evaluated():
    with pytest.raises(KeyError, match=r"no 'parts'.*parts="):
        metric(None, [[sample(0)]])
    with pytest.raises(ValueError, match='0 samples were evaluated'):
        metric().evaluate(3)
    with pytest.raises(ValueError, match='2 samples were evaluated and the data set has 1'):
        metric(batches=[[sample(0), sample(1)]]).evaluate(1)
    assert isinstance(metric(), PartIoU)
