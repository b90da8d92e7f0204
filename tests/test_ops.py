"""Point operators against naive twins: loops that follow the definition."""
import itertools

import numpy as np
import pytest
import torch

from ewa3d import ops
from ewa3d.ops import blocks
from ewa3d.ops import points as points_module


def naive_fps(points, num, start=0, skip_origin=False, length=None):
    """One cloud, one point at a time; the first of equally far points."""
    rows = points.tolist()[:length]
    allowed = [i for i, p in enumerate(rows) if not skip_origin or sum(c * c for c in p) > 1e-3]
    nearest = [float('inf')] * len(rows)
    picks = [start]
    while len(picks) < num:
        last = rows[picks[-1]]
        best, pick = -1., 0
        for i in allowed:
            nearest[i] = min(nearest[i], sum((a - b) ** 2 for a, b in zip(rows[i], last)))
            if nearest[i] > best:
                best, pick = nearest[i], i
        picks.append(pick)
    return picks


def naive_knn(query, points, k):
    """Full stable sort of float64 distances, in one cloud."""
    found = []
    for q in query.double().tolist():
        distance = [sum((a - b) ** 2 for a, b in zip(q, p)) for p in points.double().tolist()]
        found.append(sorted(range(len(distance)), key=lambda i: (distance[i], i))[:k])
    return torch.tensor(found)


def grid(side=4):
    return torch.tensor(list(itertools.product(range(side), repeat=3)), dtype=torch.float32)


def clouds(B, N, dtype=torch.float32, offset=0.):
    return (torch.randn(B, N, 3, dtype=torch.float64) + offset).to(dtype)


# ---- farthest point sampling ----------------------------------------------------------------------------------------
@pytest.fixture(params=['loop', 'compiled', 'sorted', 'pytorch3d'])
def fps_way(request, monkeypatch):
    """Every implementation in turn, whatever is installed: compiled loops run as Python where numba is not."""
    kernel = None if request.param == 'loop' else blocks.compiled() or blocks.farthest
    monkeypatch.setattr(blocks, 'compiled', lambda: kernel)
    if request.param == 'sorted':
        monkeypatch.setattr(blocks, 'LENGTH', 8)
        monkeypatch.setattr(blocks, 'SORTED', 0)
    if request.param == 'pytorch3d':
        request.getfixturevalue('pytorch3d')
    return request.param


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('B, N, num', [(3, 50, 20), (1, 37, 37), (2, 1, 1), (2, 129, 1)])
def test_fps_is_the_naive_loop(fps_way, B, N, num, dtype):
    points = clouds(B, N, dtype)
    if fps_way == 'pytorch3d' and dtype == torch.float64:
        with pytest.raises(ValueError, match='single precision'):
            ops.fps(points, num)
        return
    expected = torch.tensor([naive_fps(p, num) for p in points])
    idx = ops.fps(points, num)
    assert idx.dtype == torch.int64
    assert torch.equal(idx, expected)


def test_fps_far_from_the_origin_equals_fps_at_it(fps_way):
    points = (torch.randint(0, 256, (2, 200, 3)) / 256.).float()  # a grid that float32 holds at +1000 too
    assert torch.equal(ops.fps(points, 40), ops.fps(points + 1000, 40))


def test_fps_float64_resolves_what_float32_cannot():
    points = torch.zeros(1, 3, 3, dtype=torch.float64)
    points[0, 1, 0], points[0, 2, 0] = 1, 1 + 1e-12
    assert ops.fps(points, 2).tolist() == [[0, 2]]
    assert ops.fps(points.float(), 2).tolist() == [[0, 1]]


def test_fps_ties_and_duplicates_go_to_the_lowest_index(fps_way):
    points = torch.cat([grid(), grid()])  # every point twice, on a grid
    assert ops.fps(points[None], 100)[0].tolist() == naive_fps(points, 100)
    assert ops.fps(torch.zeros(1, 37, 3) + 0.3, 5).tolist() == [[0] * 5]
    pair = torch.rand(41, 3)  # a vectorised loop rounds its last elements apart if it fuses operations
    doubled = torch.cat([pair, pair])
    assert max(ops.fps(doubled[None], 41)[0].tolist()) < 41


def test_fps_start(fps_way):
    points = clouds(2, 30)
    assert ops.fps(points, 9, start=7)[1].tolist() == naive_fps(points[1], 9, start=7)
    idx = ops.fps(points, 9, start=torch.tensor([3, 29]))
    assert idx.tolist() == [naive_fps(points[0], 9, 3), naive_fps(points[1], 9, 29)]


def test_fps_prefix_property_and_order_of_a_whole_cloud(fps_way):
    points = clouds(2, 64)
    order = ops.fps(points, 64)
    assert torch.equal(order[:, :17], ops.fps(points, 17))
    assert torch.equal(order.sort(1)[0], torch.arange(64).expand(2, -1))


def test_fps_skip_origin(fps_way):
    points = clouds(2, 60) * 0.05  # many points within the radius
    expected = [naive_fps(p, 50, skip_origin=True) for p in points]
    assert ops.fps(points, 50, skip_origin=True).tolist() == expected
    assert ops.fps(points, 50).tolist() != expected
    assert ops.fps(points * 1e-3, 4, skip_origin=True).tolist() == [[0] * 4] * 2  # nothing else is left


def test_fps_lengths(fps_way):
    points = clouds(2, 30)
    points[0, 12:] = 99  # padding, farthest of all
    idx = ops.fps(points, 10, lengths=torch.tensor([12, 30]))
    assert idx.tolist() == [naive_fps(points[0], 10, length=12), naive_fps(points[1], 10)]
    with pytest.raises(ValueError, match='lengths'):
        ops.fps(points, 13, lengths=torch.tensor([12, 30]))


@pytest.mark.parametrize('arguments, message', [
    (dict(num=11), 'num=11.*N=10'), (dict(num=0), 'num must be at least 1, got 0'),
    (dict(num=3, start=10), 'start=10'), (dict(num=3, start=-1), 'start must be at least 0, got -1'),
    (dict(num=3, start=torch.zeros(3)), 'start'), (dict(num=3, start=torch.tensor([0, 10])), r'start=\[0, 10\]'),
    (dict(num=3, start=torch.tensor([-1, 0])), r'start=\[-1, 0\]')])
def test_fps_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.fps(torch.randn(2, 10, 3), **arguments)


def test_numbers_are_integers_and_batches_are_not_empty():
    points = torch.randn(2, 10, 3)
    for arguments, message in ((dict(num=2.5), 'fps: num'), (dict(num=2, start=1.), 'fps: start'),
                               (dict(num=2, start=torch.zeros(2)), 'fps: start must hold')):
        with pytest.raises(TypeError, match=f'{message}.* integer'):
            ops.fps(points, **arguments)
    assert ops.knn(points, points, np.int64(3))[1].shape == (2, 10, 3)
    with pytest.raises(TypeError, match=r'knn: k must be an integer, got 2\.5'):
        ops.knn(points, points, 2.5)
    with pytest.raises(ValueError, match='the batch is empty'):
        ops.fps(points[:0], 2)
    with pytest.raises(ValueError, match='num=2 points cannot be picked from N=0'):
        ops.fps(points[:, :0], 2)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_bad_coordinates_name_the_sample(value):
    points = torch.randn(4, 10, 3)
    points[2, 3, 1] = value
    for call in (lambda: ops.fps(points, 2), lambda: ops.knn(points[:, :2], points, 2),
                 lambda: ops.knn(points, torch.randn(4, 10, 3), 2)):
        with pytest.raises(ValueError, match=r'sample\(s\) \[2\]'):
            call()


def test_huge_but_finite_coordinates_are_accepted():
    assert ops.fps(torch.full((1, 5, 3), 3e38), 2).shape == (1, 2)


def test_bad_shapes_and_types():
    with pytest.raises(ValueError, match=r'\(B, N, 3\)'):
        ops.fps(torch.randn(10, 3), 2)
    with pytest.raises(ValueError, match=r'\(B, N, 3\)'):
        ops.fps(torch.randn(1, 10, 6), 2)
    with pytest.raises(TypeError, match='int64'):
        ops.fps(torch.zeros(1, 10, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match='gather'):
        ops.gather(torch.randn(2, 5, 3), torch.zeros(3, 4, dtype=torch.int64))


# ---- nearest neighbours ---------------------------------------------------------------------------------------------
@pytest.fixture(params=['partition', 'tree', 'topk', 'pytorch3d'])
def way(request, monkeypatch):
    """Every implementation in turn, whatever the size."""
    if request.param == 'pytorch3d':
        request.getfixturevalue('pytorch3d')
    elif request.param == 'topk':
        monkeypatch.setattr(points_module, '_tracing', lambda: True)
        monkeypatch.setattr(points_module, '_compiling', lambda: False)
    else:
        monkeypatch.setattr(points_module, 'TREE_POINTS', 1 if request.param == 'tree' else 10**9)
        monkeypatch.setattr(points_module, 'TREE_QUERIES', 1)
    return request.param


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('M, N, k', [(7, 60, 8), (3, 10, 10), (1, 1, 1), (5, 33, 1)])
def test_knn_is_the_naive_sort(way, M, N, k, dtype):
    query, points = clouds(2, M, dtype), clouds(2, N, dtype)
    if way == 'pytorch3d' and dtype == torch.float64:
        with pytest.raises(ValueError, match='single precision'):
            ops.knn(query, points, k)
        return
    distance, idx = ops.knn(query, points, k)
    for b in range(2):
        assert torch.equal(idx[b], naive_knn(query[b], points[b], k))
    expected = (points.gather(1, idx.flatten(1)[..., None].expand(-1, -1, 3)).view(2, M, k, 3)
                - query[:, :, None]).square().sum(-1)
    assert distance.dtype == dtype
    torch.testing.assert_close(distance, expected)
    assert (distance.diff(dim=-1) >= 0).all()


def test_knn_ties_and_duplicates_go_to_the_lowest_index(way):
    points = torch.cat([grid(), grid()])
    query = torch.cat([points[[0, 21, 42]], points[[21]] + 0.5])
    for k in (1, 5, 9, 40, 128):
        assert torch.equal(ops.knn(query[None], points[None], k)[1][0], naive_knn(query, points, k))
    same = torch.full((1, 50, 3), 0.3)
    assert ops.knn(same[:, :2], same, 4)[1].tolist() == [[[0, 1, 2, 3]] * 2]


@pytest.mark.parametrize('offset', [100., 1000., -1e5])
def test_knn_far_from_the_origin(way, offset):
    points = clouds(1, 300, offset=offset)
    query = points[:, :20]
    assert torch.equal(ops.knn(query, points, 16)[1][0], naive_knn(query[0], points[0], 16))


def test_knn_ways_agree_on_a_larger_cloud(monkeypatch):
    points = torch.randn(1, 3000, 3)
    points[0, 2000:] = points[0, :1000]  # duplicates
    query = points[:, 500:700]
    found = ops.knn(query, points, 33)[1]  # a tree by default
    monkeypatch.setattr(points_module, 'TREE_POINTS', 10**9)
    assert torch.equal(found, ops.knn(query, points, 33)[1])


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('B', [1, 5])
def test_knn_by_trees_on_threads_and_in_parts(monkeypatch, threads, B):
    points = torch.cat([grid(7), torch.rand(300, 3) * 6, grid(3)]).expand(B, -1, 3)  # ties and duplicates
    points = points + torch.arange(B).view(B, 1, 1) * 100.
    query = points[:, 200:400]
    monkeypatch.setattr(points_module, 'TREE_POINTS', 10**9)
    expected = ops.knn(query, points, 9)
    monkeypatch.setattr(points_module, 'TREE_POINTS', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    for chunk in (points_module.CHUNK, 10 * 33, 1):
        monkeypatch.setattr(points_module, 'CHUNK', chunk)
        for a, b in zip(ops.knn(query, points, 9), expected):
            assert torch.equal(a, b)


def test_knn_without_scipy_is_the_same(monkeypatch):
    points = torch.randn(2, 2100, 3)
    expected = ops.knn(points[:, :70], points, 5)
    monkeypatch.setattr(points_module, 'tree_class', lambda: None)
    monkeypatch.setattr(points_module, '_search_tree', None)
    for a, b in zip(ops.knn(points[:, :70], points, 5), expected):
        assert torch.equal(a, b)


def test_knn_in_parts(monkeypatch):
    query, points = clouds(3, 11), clouds(3, 40)
    expected = ops.knn(query, points, 6)[1]
    monkeypatch.setattr(points_module, 'DEVICE_CHUNK', 3 * 40 * 4)  # four queries at a time
    assert torch.equal(points_module._by_topk(query, points, 6), expected)
    monkeypatch.setattr(points_module, 'CHUNK', 1)
    assert torch.equal(ops.knn(query, points, 6)[1], expected)


def test_knn_of_no_query():
    assert ops.knn(torch.empty(2, 0, 3), torch.randn(2, 9, 3), 4)[1].shape == (2, 0, 4)


def test_knn_refuses():
    with pytest.raises(ValueError, match=r'k=11.*N=10'):
        ops.knn(torch.randn(1, 2, 3), torch.randn(1, 10, 3), 11)
    with pytest.raises(ValueError, match='3 sets of queries for 2 clouds'):
        ops.knn(torch.randn(3, 2, 3), torch.randn(2, 10, 3), 2)


def test_knn_distances_are_differentiable():
    query = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    points = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, p: ops.knn(q, p, 4)[0], (query, points))
    distance, idx = ops.knn(query, points, 4)
    weight = torch.randn_like(distance)
    fast = torch.autograd.grad((distance * weight).sum(), (query, points))
    naive = sum(weight[b, m, j] * (points[b, idx[b, m, j]] - query[b, m]).square().sum()
                for b, m, j in itertools.product(range(2), range(5), range(4)))
    for a, b in zip(fast, torch.autograd.grad(naive, (query, points))):
        torch.testing.assert_close(a, b)


def test_gather_forward_and_backward():
    points = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    idx = torch.randint(0, 7, (3, 4, 2))
    out = ops.gather(points, idx)
    naive = torch.stack([points[b][idx[b]] for b in range(3)])
    assert torch.equal(out, naive)
    weight = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), points),
                               torch.autograd.grad((naive * weight).sum(), points))


# ---- where they run -------------------------------------------------------------------------------------------------
def test_autocast_changes_nothing():
    points = clouds(2, 100, offset=1000.)
    plain = ops.fps(points, 20), *ops.knn(points[:, :10], points, 8)
    with torch.autocast('cpu', torch.bfloat16):
        cast = ops.fps(points, 20), *ops.knn(points[:, :10], points, 8)
    for a, b in zip(plain, cast):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_half_precision_clouds():
    points = torch.randn(2, 40, 3).bfloat16()
    assert torch.equal(ops.fps(points, 9), ops.fps(points.float(), 9))
    assert torch.equal(ops.knn(points, points, 5)[1], ops.knn(points.float(), points.float(), 5)[1])


def _sample_and_group(points):
    idx = ops.fps(points, 6, skip_origin=True)
    return idx, *ops.knn(ops.gather(points, idx), points, 4)


def test_compiled_without_graph_breaks():
    points = torch.randn(2, 30, 3)
    for a, b in zip(torch.compile(_sample_and_group, backend='aot_eager', fullgraph=True)(points),
                    _sample_and_group(points)):
        assert torch.equal(a, b)


def test_exported_with_torch_operators_alone():
    class Module(torch.nn.Module):
        def forward(self, points):
            return _sample_and_group(points)

    points = torch.randn(2, 30, 3)
    program = torch.export.export(Module(), (points,), dynamic_shapes={'points': {0: torch.export.Dim('batch')}})
    assert not [n for n in program.graph.nodes if 'ewa3d' in str(n.target)]
    points = torch.randn(5, 30, 3)
    for a, b in zip(program.module()(points), _sample_and_group(points)):
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    points = clouds(3, 500, offset=1000.)
    for a, b in zip(_sample_and_group(points.cuda()), _sample_and_group(points)):
        assert torch.equal(a.cpu(), b)


def test_reference_indices(reference):
    ref = reference('point_ops')
    points, num, k = ref.inputs['points'], int(ref.inputs['num_centres']), int(ref.inputs['k'])
    assert torch.equal(ops.fps(points, num), ref.expected['fps_plain'].long())
    assert torch.equal(ops.fps(points, num, skip_origin=True), ref.expected['fps_official'].long())
    idx = ops.knn(ref.expected['centres'], points, k)[1]
    assert torch.equal(idx.sort(-1)[0], ref.expected['knn_sorted_indices'])
