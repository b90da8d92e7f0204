"""BoxAP against a loop that follows the definition, the published numbers, and what is refused."""
import numpy as np
import pytest
import torch

from ewa3d import ops
from ewa3d.evaluation import is_of_one_class
from ewa3d.evaluation_boxes import BoxAP, average_precision, kept_boxes, match_boxes
from ewa3d.registry import METRICS
from ewa3d.structures import Sample

VARIANTS = dict(default={}, no_empty_box_test=dict(min_points=0), class_agnostic_nms=dict(nms='all'),
                no_nms=dict(nms='none'), bev_nms=dict(nms='bev'), old_nms=dict(nms_over='worse'),
                argmax_class=dict(score='objectness'), class_confidence=dict(score='class'),
                **{'nms_iou_0.5_conf_0.3': dict(nms_iou=.5, threshold=.3)})
CLASSES = ('bed', 'chair', 'desk')


def metric(classes=CLASSES, **options):
    found = METRICS.build(dict(type='BoxAP', **options))
    found.dataset_meta = dict(classes=classes)
    return found


def scene(Q=9, M=4, K=3, name='scene'):
    boxes = torch.cat([3 * torch.rand(M, 3), .5 + torch.rand(M, 3), 6 * torch.rand(M, 1)], dim=1)
    near = boxes[torch.randint(M, (Q,))] + .15 * torch.randn(Q, 7) if M else torch.rand(Q, 7)
    near[:, 3:6].clamp_(min=.1)
    return dict(name=name, gt_boxes=boxes, gt_labels=torch.randint(K - 1, (M,)), pred_boxes=near,
                pred_scores=torch.rand(Q, K).softmax(-1), pred_objectness=torch.rand(Q))


def published(ref):
    scenes = []
    for i in range(len(ref.inputs['point_clouds'])):
        real = ref.inputs['gt_box_present'][i] > 0

        def boxes(kind, i=i):
            return torch.cat([ref.inputs[f'{kind}_centers'][i], ref.inputs[f'{kind}_sizes'][i],
                              -ref.inputs[f'{kind}_angles'][i][:, None]], dim=1)
        scenes.append(dict(name=str(i), pred_boxes=boxes('pred'), pred_scores=ref.inputs['sem_cls_prob'][i],
                           pred_objectness=ref.inputs['objectness_prob'][i], gt_boxes=boxes('gt')[real],
                           gt_labels=ref.inputs['gt_box_sem_cls_label'][i][real]))
    return scenes


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', ['detection_ap_scannet', 'detection_ap_sunrgbd'])
def test_published_numbers(reference, name, variant):
    ref = reference(name)
    scenes, clouds = published(ref), ref.inputs['point_clouds']
    K = ref.meta['config']['num_semcls']
    names = [str(k) for k in range(K)]
    ours = metric(names, **VARIANTS[variant])
    for first in (0, 2, 4):
        ours.process(dict(inputs=dict(points=clouds[first:first + 2])), scenes[first:first + 2])
    for i, sample in enumerate(scenes):
        kept = torch.zeros(len(sample['pred_boxes']), dtype=torch.bool)
        kept[kept_boxes(sample['pred_boxes'], sample['pred_objectness'], sample['pred_scores'].argmax(-1), clouds[i],
                        **ours.rules)] = True
        kept &= sample['pred_objectness'] > ours.threshold
        assert kept.equal(ref.expected[f'{variant}/kept'][i])
    found = ours.evaluate(len(scenes))
    present = ref.meta['classes_with_ground_truth']
    for limit in ('0.25', '0.5'):
        percent = round(100 * float(limit))
        for kind, mean, each in (('AP', 'mAP', 'AP_per_class'), ('AR', 'AR', 'recall_per_class')):
            expected = 100 * ref.expected[f'{variant}/{each}_{limit}']
            assert found[f'{kind}{percent}'] == pytest.approx(100 * float(ref.expected[f'{variant}/{mean}_{limit}']),
                                                              abs=1e-4)
            assert found[f'{kind}{percent}_gt'] == pytest.approx(float(expected[present].mean()), abs=1e-6)
            classes = [found[f'{kind}{percent}/{k}'] for k in present]
            assert classes == pytest.approx(expected[present].tolist(), abs=1e-6)
            assert f'{kind}{percent}/{next(k for k in range(K) if k not in present)}' not in found


# ---- a twin ---------------------------------------------------------------------------------------------------------
def naive(scenes, limit, K, threshold=.05):
    """Every class by itself, one detection after the other over all scenes."""
    values, present = [], []
    for k in range(K):
        detections, truth, used = [], 0, set()
        for i, s in enumerate(scenes):
            truth += int((s['gt_labels'] == k).sum())
            kept = ops.nms3d(s['pred_boxes'], s['pred_objectness'], .25, s['pred_scores'].argmax(-1)).tolist()
            detections += [(-float(s['pred_scores'][j, k] * s['pred_objectness'][j]), i, j) for j in kept
                           if s['pred_objectness'][j] > threshold]
        right = []
        for _, i, j in sorted(detections):
            mine = (scenes[i]['gt_labels'] == k).nonzero().flatten().tolist()
            overlap = [float(ops.box3d_iou(scenes[i]['pred_boxes'][j:j + 1].double(),
                                           scenes[i]['gt_boxes'][t:t + 1].double())) for t in mine]
            best = int(np.argmax(overlap)) if mine else -1
            right.append(bool(mine) and overlap[best] > limit and (i, best) not in used)
            if right[-1]:
                used.add((i, best))
        total, ap = np.cumsum(right), 0.
        recall, precision = total / max(truth, 1), total / np.arange(1, len(right) + 1)
        for r in np.unique(recall[recall > 0]):  # by levels of recall
            ap += max(precision[recall >= r]) / truth
        values.append(100 * np.array([ap, recall[-1]]) if truth else np.zeros(2))
        present.append(truth > 0)
    return np.mean(values, axis=0), np.mean(np.array(values)[present], axis=0)


@pytest.mark.parametrize('seed', range(3))
def test_naive_over_any_batches(seed):
    torch.manual_seed(seed)
    scenes = [scene(name=str(i)) for i in range(4)] + [scene(M=0), scene(Q=1, M=3)]
    for size in (1, 4):
        ours = metric(min_points=0)
        for i in range(0, len(scenes), size):
            ours.process({}, scenes[i:i + size])
        found = ours.evaluate(len(scenes))
        for limit in (.25, .5):
            name = round(100 * limit)
            both = naive(scenes, limit, 3)
            for tail, (ap, ar) in zip(('', '_gt'), both):
                assert found[f'AP{name}{tail}'] == pytest.approx(ap) and found[f'AR{name}{tail}'] == pytest.approx(ar)
    assert 0 < found['AP50'] < found['AP50_gt'] and ours.results == []


def test_hand_made_lists():
    hits = np.array([True, False, True, False])
    assert average_precision(np.array([.9, .8, .7, .6]), hits, 4) == pytest.approx((1 / 4 + 2 / 3 / 4, .5))
    assert average_precision(np.array([.6, .7, .8, .9]), hits, 4) == pytest.approx((2 / 4 / 4 * 2, .5))
    assert average_precision(np.zeros(0), np.zeros(0, bool), 4) == (0, 0)
    assert average_precision(np.ones(2), np.ones(2, bool), 0) == (0, 0)
    iou = np.array([[.6, .0], [.9, .1], [.3, .55], [.55, .5]])
    assert match_boxes(iou, np.array([.9, .8, .7, .6]), .5).tolist() == [True, False, True, False]
    assert match_boxes(iou, np.array([.6, .8, .7, .9]), .5).tolist() == [False, False, True, True]
    assert match_boxes(iou, np.array([.6, .8, .7, .9]), .25).tolist() == [False, False, True, True]
    assert match_boxes(iou[:, :0], np.ones(4), .25).tolist() == [False] * 4
    assert match_boxes(iou[:1], np.ones(1), .6).tolist() == [False]  # more than the limit


def test_the_truth_itself_is_perfect():
    samples = []
    for i in range(3):
        s = scene(M=5, name=str(i))
        s['gt_boxes'][:, :3] = 10 * torch.arange(5.)[:, None]
        samples.append(dict(s, pred_boxes=s['gt_boxes'], pred_scores=torch.eye(3)[s['gt_labels']],
                            pred_objectness=torch.ones(5)))
    ours = metric(min_points=0, score='objectness')
    ours.process({}, samples)
    found = ours.evaluate(3)
    assert all(value == pytest.approx(100) for value in found.values())
    assert set(found) <= set(BoxAP.metric_names(CLASSES)) and 'AP25/bed' in found and 'AP25/desk' not in found
    assert is_of_one_class('val/AP25/bed') and not is_of_one_class('val/AP25_gt')


def test_boxes_without_points():
    boxes = torch.tensor([[0., 0, 0, 1, 1, 1, 0], [5, 0, 0, 1, 1, 1, 0], [9, 0, 0, 1, 1, 1, 0]])
    points, objectness, labels = torch.zeros(5, 4), torch.tensor([.2, .4, .9]), torch.zeros(3, dtype=torch.long)
    assert kept_boxes(boxes, objectness, labels, points).tolist() == [0]
    assert kept_boxes(boxes, objectness, labels, points[:4]).tolist() == [2]  # none is full: the best stays
    assert kept_boxes(boxes, objectness, labels, min_points=0).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match='min_points=5 needs the points'):
        kept_boxes(boxes, objectness, labels)


def test_scores_and_hits_are_kept_and_nothing_else():
    ours = metric()
    s = scene(Q=6)
    ours.process(dict(inputs=dict(points=torch.rand(1, 9000, 3))), [Sample(metainfo=dict(name='a')).to_dict() | s])
    (kept,) = ours.results
    assert {key: value.ndim for key, value in kept.items()} == dict(scores=2, hits=3, truth=1)
    assert sum(value.size for value in kept.values()) <= 6 * 3 * 3 + 3


def test_scenes_without_truth_or_predictions():
    ours = metric(min_points=0)
    ours.process({}, [scene(M=0), dict(scene(), pred_boxes=torch.zeros(0, 7), pred_scores=torch.zeros(0, 3),
                                       pred_objectness=torch.zeros(0))])
    found = ours.evaluate(2)
    assert found['AP25'] == found['AP25_gt'] == 0
    ours.process({}, [scene(M=0)])
    assert ours.evaluate(1)['AP50_gt'] == 0
    prefixed = metric(min_points=0, prefix='val')
    prefixed.process({}, [scene(M=0)])
    assert set(prefixed.evaluate(1)) <= set(BoxAP.metric_names(CLASSES, 'val'))


@pytest.mark.parametrize('change, error, message', [
    (dict(pred_scores=None), KeyError, "sample 'scene' needs 'pred_scores'"),
    (dict(gt_boxes=torch.zeros(3, 7)), ValueError, r'gt_boxes \(3, 7\), gt_labels \(4,\)'),
    (dict(pred_boxes=torch.zeros(9, 6)), ValueError, r'pred_boxes \(9, 6\)'),
    (dict(pred_objectness=torch.full((9,), float('nan'))), ValueError, "pred_objectness of sample 'scene' is not fin"),
    (dict(pred_scores=-torch.ones(9, 3)), ValueError, 'probabilities'),
    (dict(gt_labels=torch.full((4,), 3)), ValueError, 'a box of class 3, outside of 0 … 2')])
def test_samples_that_cannot_be(change, error, message):
    sample = {key: value for key, value in {**scene(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        metric(min_points=0).process({}, [sample])


def test_what_cannot_be_evaluated():
    with pytest.raises(KeyError, match=r"no inputs\['points'\].*min_points=0"):
        metric().process({}, [scene()])
    with pytest.raises(ValueError, match='0 samples were evaluated'):
        metric().evaluate(3)
    ours = metric(('a', 'b'), min_points=0)
    ours.process({}, [scene()])
    with pytest.raises(ValueError, match='has 2 classes, pred_scores 3'):
        ours.evaluate(1)
    for options, message in ((dict(nms='hard'), "nms='hard'"), (dict(score='mean'), "score='mean'"),
                             (dict(iou=[1.5]), r'iou must lie in \[0, 1\)'), (dict(min_points=-1), 'at least 0')):
        with pytest.raises(ValueError, match=message):
            metric(**options)
