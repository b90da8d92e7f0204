"""Boxes: areas against polygon clipping in plain Python, gradients against differences, published numbers."""
import math

import numpy as np
import pytest
import torch

from ewa3d import ops
from ewa3d.bench.boxes import area, clip_convex, iou_loop, overlap_plain, points_in_boxes_naive, rectangle
from ewa3d.ops.boxes import _Pairs, box3d_intersection, box3d_volume, common_area, overlap_area

PAIR = torch.tensor([[0., 0, 0, 1, 1, 1, 0]])


def boxes_of(*shape, spread=1.5, low=.2, high=2.):
    boxes = torch.rand(*shape, 7, dtype=torch.float64)
    boxes[..., :3] = spread * (2 * boxes[..., :3] - 1)
    boxes[..., 3:6] = low + (high - low) * boxes[..., 3:6]
    boxes[..., 6] = 40 * (boxes[..., 6] - .5)
    return boxes


def naive(a, b):
    return iou_loop(a, b, overlap_plain)


def naive_giou(a, b):
    """From corners: the hull of all 16, and the union by definition."""
    found = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    iou = naive(a, b)[0]
    for i, p in enumerate(a[0]):
        for j, q in enumerate(b[0]):
            corners = torch.cat([ops.box3d_corners(p), ops.box3d_corners(q)])
            hull = float((corners.max(0)[0] - corners.min(0)[0]).prod())
            union = float(box3d_volume(p) + box3d_volume(q)) / (1 + float(iou[i, j]))
            found[i, j] = float(iou[i, j]) - (hull - union) / hull
    return found


# ---- published numbers ----------------------------------------------------------------------------------------------
def cameras(points):
    """From z up to a camera's frame with y down, in which the published corners are."""
    return torch.stack([points[..., 0], -points[..., 2], points[..., 1]], dim=-1)


@pytest.fixture
def published(reference):
    ref = reference('detection_boxes')
    boxes = [torch.cat([ref.inputs[f'centers{i}'], ref.inputs[f'sizes{i}'], -ref.inputs[f'angles{i}'][..., None]], -1)
             for i in (1, 2)]
    real = torch.arange(boxes[1].shape[1]) < ref.inputs['count2'][:, None, None]
    return ref, *boxes, real


def test_published_corners_and_iou(published):
    ref, a, b, _ = published
    for boxes, key in ((a, 'corners1'), (b, 'corners2')):
        torch.testing.assert_close(cameras(ops.box3d_corners(boxes)), ref.expected[key], atol=1e-6, rtol=1e-6)
    there = ~ref.expected['eval_iou3d'].isnan()
    for dtype in (torch.float32, torch.float64):
        found = ops.box3d_iou(a.to(dtype), b.to(dtype)).double()
        torch.testing.assert_close(found[there], ref.expected['eval_iou3d'][there], atol=1e-6, rtol=0)


@pytest.mark.parametrize('rotated, key', [(True, 'giou_rotated'), (False, 'giou_axis_aligned')])
def test_published_training_giou(published, rotated, key):
    ref, a, b, real = published
    torch.testing.assert_close(ops.official_giou(a, b, rotated) * real, ref.expected[key], atol=2e-5, rtol=1e-4)


def test_ours_is_the_published_one_where_that_loses_nothing(published):
    ref, a, b, real = published
    lost = ref.expected['overlap_lost_by_prefilter'] & real
    solid = (a[..., 3:6].amin(-1) > .01)[:, :, None] & (b[..., 3:6].amin(-1) > .01)[:, None] & real
    ours, theirs = ops.box3d_giou(a, b), ref.expected['giou_rotated']
    torch.testing.assert_close(ours[solid & ~lost], theirs[solid & ~lost], atol=2e-5, rtol=1e-4)
    assert bool((ours > theirs + 1e-4)[lost & solid].all()) and bool((lost & solid).any())


def test_published_gradient(published):
    ref, a, b, real = published
    given, moved = a.clone().requires_grad_(), a.clone().requires_grad_()
    (ops.official_giou(given, b, True) * real).sum().backward()
    (cameras(ops.box3d_corners(moved)) * ref.expected['giou_rotated_grad_corners1']).sum().backward()
    smooth = a[..., 6].sin().abs() > 1e-6  # the hull has a kink at heading 0
    torch.testing.assert_close(given.grad[smooth], moved.grad[smooth], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(given.grad[..., :6], moved.grad[..., :6], atol=1e-3, rtol=1e-3)


def test_published_suppression(reference):
    ref = reference('detection_boxes')
    low, high, score, label = ref.inputs['nms_boxes'].split([3, 3, 1, 1], dim=1)
    boxes = torch.cat([(low + high) / 2, high - low, torch.zeros(len(low), 1)], dim=1)
    for over, key in (('union', 'aabb_nms_kept'), ('worse', 'aabb_nms_kept_old_type')):
        kept = ops.nms3d(boxes, score[:, 0], 0.25, label[:, 0], over)
        assert kept.sort()[0].tolist() == ref.expected[key].tolist()


# ---- values ---------------------------------------------------------------------------------------------------------
def test_known_areas():
    turned = torch.tensor([[0., 0, 0, 1, 1, 1, math.pi / 4]], dtype=torch.float64)
    octagon = float(box3d_intersection(PAIR.double(), turned))
    assert octagon == pytest.approx(2 * (math.sqrt(2) - 1), abs=1e-12)
    half = PAIR + torch.tensor([[.5, 0, 0, 0, 0, 0, 0]])
    assert float(ops.box3d_iou(PAIR, half)) == pytest.approx(1 / 3)
    assert float(ops.box3d_giou(PAIR, half)) == pytest.approx(1 / 3)  # the hull is the union
    assert float(ops.box3d_giou(PAIR, PAIR + torch.tensor([[9., 0, 0, 0, 0, 0, 0]]))) == pytest.approx(-.8)


def test_corners_are_those_of_the_box():
    corners = ops.box3d_corners(torch.tensor([1., 2, 3, 4, 2, 6, math.pi / 2]))
    expected = [[0, 4, 0], [2, 4, 0], [2, 0, 0], [0, 0, 0], [0, 4, 6], [2, 4, 6], [2, 0, 6], [0, 0, 6]]
    torch.testing.assert_close(corners, torch.tensor(expected).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize('spread', [.3, 1., 2.5])
def test_iou_and_giou_are_those_of_clipped_polygons(spread):
    a, b = boxes_of(1, 14, spread=spread), boxes_of(1, 11, spread=spread)
    torch.testing.assert_close(ops.box3d_iou(a, b), naive(a, b), atol=1e-12, rtol=0)
    torch.testing.assert_close(ops.box3d_giou(a, b)[0], naive_giou(a, b), atol=1e-12, rtol=0)
    torch.testing.assert_close(ops.box3d_iou(a.float(), b.float()).double(), naive(a.float(), b.float()), atol=3e-6,
                               rtol=0)


@pytest.mark.parametrize('spread', [1., 5.])
def test_all_pairs_at_once_and_near_pairs_alone_are_the_same(spread):
    a, b = boxes_of(2, 6, spread=spread).requires_grad_(), boxes_of(2, 5, spread=spread).requires_grad_()
    both = ((a[:, :, None, 2] - b[:, None, :, 2]).abs() < (a[:, :, None, 5] + b[:, None, :, 5]) / 2).double()
    weight = both * torch.rand(2, 6, 5, dtype=torch.float64)  # along z
    near, dense = _Pairs(a, b).area(), common_area(a.unsqueeze(2), b.unsqueeze(1))
    torch.testing.assert_close(near * both, dense * both, atol=1e-14, rtol=0)
    for ours, plain in zip(*(torch.autograd.grad((areas * weight).sum(), (a, b)) for areas in (near, dense))):
        torch.testing.assert_close(ours, plain)


def special(base):
    """Boxes in every relation to ``base``, from equal to empty."""
    x, y, z, dx, dy, dz, yaw = base.tolist()
    cos, sin = math.cos(yaw), math.sin(yaw)

    def at(u=0., v=0., w=0., sizes=(dx, dy, dz), turn=0.):
        return [x + u * cos - v * sin, y + u * sin + v * cos, z + w, *sizes, yaw + turn]
    return torch.tensor([
        at(), at(turn=math.pi), at(turn=-math.pi), at(turn=2 * math.pi),  # the same
        at(sizes=(dy, dx, dz), turn=math.pi / 2), at(turn=1e-7), at(u=1e-9), at(turn=1e-12, u=1e-12),
        at(sizes=(dx / 2, dy / 2, dz / 2)), at(sizes=(3 * dx, 2 * dy, 2 * dz)), at(sizes=(.1, .1, .1), turn=.3),
        at(u=dx / 4, sizes=(dx / 2, dy, dz)), at(u=dx / 4, sizes=(dx / 2, dy / 3, dz)),  # inside, along faces
        at(u=dx), at(v=-dy), at(w=dz), at(u=dx, v=dy), at(u=dx, v=dy, w=-dz), at(u=dx, v=dy / 3),  # touching
        at(u=dx / 2 + dy / 2, turn=math.pi / 2), at(u=1e4), at(u=-1e6, v=1e6), at(w=50.),  # apart
        at(sizes=(0., dy, dz)), at(sizes=(dx, 0., dz)), at(sizes=(dx, dy, 0.)), at(sizes=(0., 0., 0.)),
        at(sizes=(1e-3, 1e-3, 1e-3)), at(sizes=(1e-3, 50., 1e-3), turn=1.), at(turn=math.pi / 4),
    ], dtype=torch.float64)[None]


@pytest.mark.parametrize('yaw', [0., .5, math.pi / 2, -2., 3 * math.pi / 4])
def test_special_pairs(yaw):
    base = torch.tensor([.3, -.2, .1, 2., 1., .7, yaw], dtype=torch.float64)
    others = torch.cat([special(base), base.new_zeros(1, 1, 7)], dim=1)
    exact = naive(others, others)
    torch.testing.assert_close(ops.box3d_iou(others, others), exact, atol=1e-8, rtol=0)
    found = ops.box3d_iou(others.float(), others.float())
    close = others[0, :, :2].abs().amax(1) < 1e3  # float32 moves boxes that are 1000 km away
    torch.testing.assert_close(found[:, close][:, :, close].double(), exact[:, close][:, :, close], atol=2e-5, rtol=0)
    for values in (found, ops.box3d_giou(others.float(), others.float())):
        assert bool(values.isfinite().all()) and float(values.max()) <= 1 + 1e-6 and float(values.min()) >= -1 - 1e-6


def test_a_box_and_itself():
    boxes = boxes_of(50, spread=20).float()
    torch.testing.assert_close(ops.box3d_iou(boxes, boxes).diagonal(), torch.ones(50), atol=2e-6, rtol=0)
    straight = boxes * torch.tensor([1, 1, 1, 1, 1, 1, 0])  # that of a turned box is less: its hull is larger
    torch.testing.assert_close(ops.box3d_giou(straight, straight).diagonal(), torch.ones(50), atol=2e-6, rtol=0)
    empty = boxes.clone()
    empty[:, 3] = 0
    assert not ops.box3d_iou(empty, empty).any()
    assert not ops.box3d_iou(boxes * torch.tensor([1, 1, 1, -1, 1, 1, 1]), boxes).any()  # a negative size counts as 0
    assert float(ops.box3d_giou(torch.zeros(1, 7), torch.zeros(1, 7))) == 0


def test_far_from_the_origin():
    a, b = boxes_of(1, 12), boxes_of(1, 12)
    a[..., :3], b[..., :3] = (a[..., :3] * 64).round() / 64, (b[..., :3] * 64).round() / 64  # float32 holds these there
    near, moved = ops.box3d_iou(a, b), torch.tensor([1024., -2048, 4096, 0, 0, 0, 0])
    torch.testing.assert_close(ops.box3d_iou(a.float() + moved, b.float() + moved).double(), near, atol=3e-6, rtol=0)


def test_a_small_box_in_a_large_one_is_as_exact_as_by_itself():
    small = torch.tensor([[3., 4, 0, .01, .02, 1, .3]])
    large = torch.tensor([[0., 0, 0, 40, 40, 1, 1.1]])
    assert float(box3d_intersection(small, large)) == pytest.approx(2e-4, rel=1e-5)
    assert float(box3d_intersection(large, small)) == pytest.approx(2e-4, rel=1e-3)


def test_batches_and_dtypes():
    a, b = boxes_of(2, 3, 5), boxes_of(2, 3, 4)
    whole = ops.box3d_giou(a, b)
    assert whole.shape == (2, 3, 5, 4) and whole.dtype == torch.float64
    torch.testing.assert_close(ops.box3d_giou(a[1, 2], b[1, 2]), whole[1, 2])
    assert ops.box3d_iou(a.bfloat16(), b.half()).dtype == torch.float32
    assert ops.box3d_iou(a[..., :0, :], b).shape == (2, 3, 0, 4)
    assert ops.box3d_iou(a, b[..., :0, :]).shape == (2, 3, 5, 0)


# ---- gradients ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('function', [ops.box3d_iou, ops.box3d_giou, box3d_intersection,
                                      lambda a, b: ops.official_giou(a, b, True)])
def test_gradients(function):
    a, b = (boxes_of(1, count, spread=.5).requires_grad_() for count in (4, 3))
    assert torch.autograd.gradcheck(function, (a, b))


def test_gradients_are_finite_everywhere():
    base = torch.tensor([.3, -.2, .1, 2., 1., .7, .4], dtype=torch.float64)
    others = torch.cat([special(base), base.new_zeros(1, 1, 7), -special(base)], dim=1)
    for dtype in (torch.float32, torch.float64):
        for function in (ops.box3d_iou, ops.box3d_giou, lambda a, b: ops.official_giou(a, b, True)):
            a, b = (others.to(dtype).clone().requires_grad_() for _ in range(2))
            function(a, b).sum().backward()
            assert bool(a.grad.isfinite().all()) and bool(b.grad.isfinite().all())


@pytest.mark.parametrize('size', [1e-3, 1e-9, 1e-13, 1e-25, 1e-38])
def test_gradients_of_tiny_boxes_are_finite(size):
    tiny = torch.tensor([[0., 0, 0, size, size, size, .3], [size, 0, 0, size, 1, size, 0], [0, 0, 0, 1, 1, 1, 0]])
    for function in (ops.box3d_iou, ops.box3d_giou):
        a, b = tiny.clone().requires_grad_(), tiny.clone().requires_grad_()
        function(a, b).sum().backward()
        assert bool(a.grad.isfinite().all()) and bool(b.grad.isfinite().all())


@pytest.mark.parametrize('function, start, target', [
    (ops.box3d_giou, [-3., 2, 0, 1, 1, 2, 0], [1., -1, .5, 2, 1, 1, 0]),
    (ops.box3d_iou, [.6, -.7, .2, 1, 1, 2, 0], [1., -1, .5, 2, 1, 1, .8])])
def test_gradients_lead_to_the_target(function, start, target):
    box, target = torch.tensor([start], requires_grad=True), torch.tensor([target])
    optimizer = torch.optim.Adam([box], lr=.08)
    for _ in range(100):
        optimizer.zero_grad()
        (-function(box, target)).sum().backward()
        optimizer.step()
    assert float(ops.box3d_iou(box.detach(), target)) > .85


# ---- points and suppression -----------------------------------------------------------------------------------------
def test_points_in_boxes(monkeypatch):
    boxes, points = boxes_of(2, 5).float(), 2 * torch.randn(2, 300, 4)
    expected = points_in_boxes_naive(points, boxes)
    assert bool(expected.any()) and ops.points_in_boxes(points, boxes).equal(expected)
    assert ops.points_in_boxes(points[1], boxes[1]).equal(expected[1])
    monkeypatch.setattr('ewa3d.ops.boxes.CHUNK', 700)
    assert ops.points_in_boxes(points, boxes).equal(expected)
    assert ops.points_in_boxes(points[:, :0], boxes).shape == (2, 5, 0)
    assert ops.points_in_boxes(points, boxes[:, :0]).shape == (2, 0, 300)
    corners = ops.box3d_corners(PAIR * 2)  # faces included
    assert bool(ops.points_in_boxes(corners[0], PAIR * 2).all())


def suppress_naive(boxes, scores, threshold, labels):
    left, kept = sorted(range(len(scores)), key=lambda i: -float(scores[i])), []
    corners = ops.box3d_corners(boxes)
    low, high = corners.amin(1), corners.amax(1)
    while left:
        best, *left = left
        kept.append(best)
        rest = []
        for i in left:
            common = float((torch.minimum(high[i], high[best]) - torch.maximum(low[i], low[best])).clamp(min=0).prod())
            union = float((high[i] - low[i]).prod() + (high[best] - low[best]).prod()) - common
            if labels[i] != labels[best] or common <= threshold * union:
                rest.append(i)
        left = rest
    return kept


@pytest.mark.parametrize('threshold', [0., .25, .6])
def test_suppression(threshold):
    boxes, scores, labels = boxes_of(40), torch.rand(40), torch.randint(3, (40,))
    assert ops.nms3d(boxes, scores, threshold, labels).tolist() == suppress_naive(boxes, scores, threshold, labels)
    same = torch.zeros(40)
    assert ops.nms3d(boxes, scores, threshold).tolist() == suppress_naive(boxes, scores, threshold, same)


def test_suppression_of_equal_scores_and_of_nothing():
    assert ops.nms3d(PAIR.repeat(3, 1), torch.ones(3)).tolist() == [0]
    assert ops.nms3d(PAIR.repeat(3, 1), torch.ones(3), labels=torch.tensor([0, 1, 0])).tolist() == [0, 1]
    assert ops.nms3d(torch.zeros(0, 7), torch.zeros(0)).tolist() == []
    above = torch.cat([PAIR, PAIR + torch.tensor([[0., 0, 5, 0, 0, 0, 0]])])
    assert len(ops.nms3d(above, torch.ones(2))) == 2 and len(ops.nms3d(above, torch.ones(2), axes='xy')) == 1


# ---- others ---------------------------------------------------------------------------------------------------------
def test_pytorch3d():
    pytest.importorskip('pytorch3d')
    from pytorch3d.ops import box3d_overlap
    a, b = boxes_of(20, low=.5).float(), boxes_of(15, low=.5).float()
    # its corners: a face counter-clockwise seen from above, then the other one
    order = [2, 1, 0, 3, 6, 5, 4, 7]
    volume, iou = box3d_overlap(ops.box3d_corners(a)[:, order], ops.box3d_corners(b)[:, order])
    torch.testing.assert_close(ops.box3d_iou(a, b), iou, atol=1e-4, rtol=0)
    torch.testing.assert_close(box3d_intersection(a, b), volume, atol=1e-3, rtol=0)


def test_overlap_area_broadcasts_and_vanishes_for_points():
    found = overlap_area(*torch.zeros(2, 3), torch.tensor(.5), torch.tensor(1.), torch.tensor([0., .3, 1.]),
                         torch.tensor(2.), torch.tensor(2.))
    torch.testing.assert_close(found, torch.full((3,), 2.))
    assert area(clip_convex(rectangle(np.zeros(7)), rectangle(np.ones(7)))) == 0


@pytest.mark.parametrize('call, error, message', [
    (lambda: ops.box3d_iou(PAIR[0], PAIR), ValueError, r'the first boxes must be \(…, N, 7\).*\(7,\)'),
    (lambda: ops.box3d_iou(PAIR, PAIR[:, :6]), ValueError, r'the second boxes must be.*\(1, 6\)'),
    (lambda: ops.box3d_giou(PAIR[None], PAIR), ValueError, r'equal … expected, got \(1, 1, 7\) and \(1, 7\)'),
    (lambda: ops.box3d_iou(PAIR.numpy(), PAIR), TypeError, 'a tensor of numbers.*ndarray'),
    (lambda: ops.box3d_iou(PAIR > 0, PAIR), TypeError, 'bool'),
    (lambda: ops.points_in_boxes(torch.zeros(5, 2), PAIR), ValueError, r'points \(…, P, 3\+F\).*\(5, 2\)'),
    (lambda: ops.points_in_boxes(torch.zeros(2, 5, 3), PAIR[None]), ValueError, r'\(2, 5, 3\) and \(1, 1, 7\)'),
    (lambda: ops.nms3d(PAIR, torch.zeros(2)), ValueError, r'scores \(N,\) expected, got \(1, 7\) and \(2,\)'),
    (lambda: ops.nms3d(PAIR, torch.zeros(1), labels=torch.zeros(2)), ValueError, r'labels \(N,\) expected'),
    (lambda: ops.nms3d(PAIR, torch.zeros(1), threshold=2), ValueError, r'threshold must lie in \[0, 1\]'),
    (lambda: ops.nms3d(PAIR, torch.zeros(1), over='both'), ValueError, "over must be 'union' or 'worse'.*'both'")])
def test_what_cannot_be(call, error, message):
    with pytest.raises(error, match=message):
        call()
