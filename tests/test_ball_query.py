"""The ball query against loops that follow the definition."""
import pytest
import torch

from ewa3d import ops
from ewa3d.ops import points as points_module


def naive(query, points, radius, k):
    found = torch.zeros(*query.shape[:2], k, dtype=torch.int64)
    for b, cloud in enumerate(points):
        for m, center in enumerate(query[b]):
            hits = [i for i, p in enumerate(cloud) if float((p - center).square().sum()) < radius ** 2][:k]
            if hits:
                found[b, m] = torch.tensor(hits + [hits[0]] * (k - len(hits)))
    return found


@pytest.fixture(params=['scan', 'tree', 'pytorch3d'])
def way(request, monkeypatch):
    """Small clouds are scanned, large ones searched with a tree; here all take the same small clouds."""
    if request.param == 'pytorch3d':
        request.getfixturevalue('pytorch3d')
    if request.param == 'tree':
        pytest.importorskip('scipy')
        monkeypatch.setattr(points_module, 'TREE_POINTS', 1)
        monkeypatch.setattr(points_module, 'TREE_QUERIES', 1)
    return request.param


@pytest.mark.parametrize('radius', [0.05, 0.6, 5.])
@pytest.mark.parametrize('k', [1, 7, 300])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_is_the_naive_loop(way, radius, k, dtype):
    points = torch.randn(2, 60, 3, dtype=dtype)
    query = torch.cat([points[:, :5], torch.randn(2, 4, 3, dtype=dtype), points[:, :2] + 100], 1)
    if way == 'pytorch3d' and dtype == torch.float64:
        with pytest.raises(ValueError, match='single precision'):
            ops.ball_query(query, points, radius, k)
        return
    found = ops.ball_query(query, points, radius, k)
    assert found.dtype == torch.int64 and torch.equal(found, naive(query, points, radius, k))
    assert torch.equal(found[:, -2:], torch.zeros(2, 2, k, dtype=torch.int64))  # no hit: index 0, as the kernel


def test_the_border_is_outside(way):
    points = torch.tensor([[[0., 0, 0], [1, 0, 0], [0.5, 0, 0], [0, 1, 0], [0, 0, 0.25]]])
    assert ops.ball_query(points[:, :1], points, 1., 4).tolist() == [[[0, 2, 4, 0]]]


def test_clouds_that_are_alike_or_far_away(way):
    points = (torch.randint(0, 256, (1, 80, 3)) / 64.).float()  # a grid that float32 holds at +1000 too
    query = points[:, :20]
    expected = naive(query, points, 0.9, 12)
    assert torch.equal(ops.ball_query(query, points, 0.9, 12), expected)
    assert torch.equal(ops.ball_query(query + 1000, points + 1000, 0.9, 12), expected)
    same = torch.ones(2, 30, 3)
    assert torch.equal(ops.ball_query(same[:, :3], same, 0.1, 4), torch.arange(4).expand(2, 3, 4))


def test_dense_balls_of_a_large_cloud_need_no_lists():
    points = torch.rand(2, 3000, 3)
    query = torch.cat([points[:, :70] * 0.1, points[:, :3] + 9], 1)
    found = ops.ball_query(query, points, 0.7, 5)
    distance = (query.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)
    for b, m in ((0, 0), (1, 40), (0, 69)):
        assert torch.equal(found[b, m], (distance[b, m] < 0.49).nonzero().flatten()[:5])
    assert torch.equal(found[:, -3:], torch.zeros(2, 3, 5, dtype=torch.int64))


def test_fixture(reference):
    ref = reference('point_ops')
    found = ops.ball_query(ref.expected['ball_query_centres'], ref.inputs['points'], float(ref.inputs['radius']),
                           int(ref.inputs['nsample']))
    assert torch.equal(found, ref.expected['ball_query'].long())


def test_compiled_graphs_keep_it_whole():
    points = torch.randn(2, 40, 3)
    found = torch.compile(lambda p: ops.ball_query(p[:, :6], p, 1., 4) + 0, backend='eager')(points)
    assert torch.equal(found, ops.ball_query(points[:, :6], points, 1., 4))


def test_half_precision_and_empty_batches():
    points = torch.randn(1, 30, 3).bfloat16()
    assert torch.equal(ops.ball_query(points, points, 1., 4), naive(points.float(), points.float(), 1., 4))
    assert ops.ball_query(torch.zeros(0, 3, 3), torch.zeros(0, 9, 3), 1., 4).shape == (0, 3, 4)


@pytest.mark.parametrize('change, error, message', [
    (dict(radius=0.), ValueError, 'radius must lie in'), (dict(radius='x'), TypeError, 'radius must be a number'),
    (dict(k=0), ValueError, 'k must be at least 1'), (dict(k=2.), TypeError, 'k must be an integer'),
    (dict(points=torch.zeros(2, 0, 3)), ValueError, 'no points'),
    (dict(points=torch.zeros(1, 5, 3)), ValueError, '2 sets of queries for 1 clouds'),
    (dict(points=torch.full((2, 5, 3), float('nan'))), ValueError, r'points has NaN .* \[0, 1\]'),
    (dict(query=torch.zeros(2, 5, 2)), ValueError, 'query must have the shape')])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        ops.ball_query(**{**dict(query=torch.zeros(2, 4, 3), points=torch.zeros(2, 5, 3), radius=1., k=2), **change})
