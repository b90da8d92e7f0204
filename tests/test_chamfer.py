"""Chamfer distances against the definition: a matrix of all pairs in the graph."""
import pytest
import torch

from ewa3d import ops
from ewa3d.ops import chamfer


def naive_ways(x, y):
    """Squared distances to the nearest, both ways, from the matrix of all pairs; of equal ones, the first counts."""
    distance = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)  # (B, N, M)
    return distance.min(2)[0], distance.min(1)[0]


def naive(x, y, norm='l2'):
    there, back = naive_ways(x, y)
    if norm == 'l1':
        return (there.sqrt().mean(1) + back.sqrt().mean(1)).mean() / 2
    return (there.mean(1) + back.mean(1)).mean()


def gradients(function, x, y, **options):
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = function(x, y, **options)
    value.backward()
    return value.detach(), x.grad, y.grad


@pytest.fixture(params=['torch', 'pytorch3d'])
def backend(request):
    if request.param == 'pytorch3d':
        request.getfixturevalue('pytorch3d')
    return request.param


SIZES = [(3, 17, 29), (1, 1, 1), (2, 1, 40), (40, 8, 8), (2, 600, 530)]  # the last one by trees


@pytest.mark.parametrize('norm', ['l1', 'l2'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('B, N, M', SIZES)
def test_values_and_gradients_are_the_naive_ones(backend, B, N, M, dtype, norm):
    x, y = torch.randn(B, N, 3, dtype=dtype), torch.randn(B, M, 3, dtype=dtype)
    if backend == 'pytorch3d' and dtype == torch.float64:
        with pytest.raises(ValueError, match='single precision'):
            ops.chamfer_distance(x, y)
        return
    for ours, expected in zip(gradients(ops.chamfer_distance, x, y, norm=norm), gradients(naive, x, y, norm=norm)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('B, N, M', SIZES)
def test_nearest_squared_is_one_way(backend, B, N, M):
    x, y = torch.randn(B, N, 3), torch.randn(B, M, 3)
    there, back = naive_ways(x, y)
    torch.testing.assert_close(ops.nearest_squared(x, y), there)
    torch.testing.assert_close(ops.nearest_squared(y, x), back)


def test_without_reduction_there_is_one_value_a_cloud(backend):
    x, y = torch.randn(4, 9, 3), torch.randn(4, 6, 3)
    for norm in ('l1', 'l2'):
        each = ops.chamfer_distance(x, y, norm, reduction='none')
        torch.testing.assert_close(each, torch.stack([naive(a[None], b[None], norm) for a, b in zip(x, y)]))
        torch.testing.assert_close(each.mean(), ops.chamfer_distance(x, y, norm))


@pytest.mark.parametrize('size', [30, 600])
def test_far_from_the_origin_it_is_exact(backend, size):
    x, y = (torch.randint(0, 1024, (2, size, 3)) / 1024. for _ in range(2))  # a grid that float32 holds at +1000 too
    for norm in ('l1', 'l2'):
        at, away = ops.chamfer_distance(x, y, norm), ops.chamfer_distance(x + 1000, y + 1000, norm)
        torch.testing.assert_close(at, away, rtol=1e-6, atol=0)
        torch.testing.assert_close(at, naive(x.double(), y.double(), norm).float())


def test_the_gradient_is_that_of_finite_differences():
    x, y = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    for norm in ('l1', 'l2'):
        assert torch.autograd.gradcheck(lambda x, y: ops.chamfer_distance(x, y, norm), (x, y))  # noqa: B023
        assert torch.autograd.gradcheck(lambda x: ops.chamfer_distance(x, y.detach(), norm), (x,))  # noqa: B023


def test_of_equally_near_points_the_first_takes_the_gradient():
    x = torch.tensor([[[0., 0, 0], [4, 0, 0]]])
    y = torch.tensor([[[1., 0, 0], [-1, 0, 0], [1, 0, 0], [5, 0, 0]]])
    for ours, expected in zip(gradients(ops.chamfer_distance, x, y), gradients(naive, x, y)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize('size', [20, 700])
def test_duplicates_have_the_naive_value_and_a_gradient_of_the_same_sum(backend, size):
    """Where points are equal it does not matter which of them moves."""
    x = torch.randn(2, size // 4, 3).repeat(1, 4, 1)
    y = torch.randn(2, size // 5, 3).repeat(1, 5, 1)
    for norm in ('l1', 'l2'):
        ours, expected = gradients(ops.chamfer_distance, x, y, norm=norm), gradients(naive, x, y, norm=norm)
        torch.testing.assert_close(ours[0], expected[0])
        for a, b, copies in zip(ours[1:], expected[1:], (4, 5)):
            a, b = (g.unflatten(1, (copies, -1)).sum(1) for g in (a, b))
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('size', [6, 520])
def test_at_a_distance_of_zero_the_gradient_is_zero_and_not_nan(size):
    x = torch.randn(1, size, 3)
    y = x.clone()
    y[:, :3] += 0.1
    value, *grads = gradients(ops.chamfer_distance, x, y, norm='l1')
    assert value > 0 and all(torch.isfinite(g).all() for g in grads)
    for norm in ('l1', 'l2'):
        value, *grads = gradients(ops.chamfer_distance, x, x, norm=norm)
        assert value == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(backend, dtype):
    x, y = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 8, 3)
    value, grad, _ = gradients(ops.chamfer_distance, x, y)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, naive(x.float(), y))
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(ops.chamfer_distance(x.float(), y), value)


def test_in_parts_it_is_the_same(monkeypatch):
    x, y = torch.randn(7, 11, 3), torch.randn(7, 13, 3)
    expected = chamfer._nearest(x, y)
    for limit in (1, 13 * 4, 11 * 13 * 2, 11 * 13 * 100):  # some queries, some clouds, everything at a time
        monkeypatch.setattr(chamfer, 'CHUNK', limit)
        assert torch.equal(chamfer._nearest(x, y), expected)


@pytest.mark.parametrize('threads, B', [(1, 3), (2, 3), (2, 1)])
def test_trees_find_what_comparing_finds(monkeypatch, threads, B):
    x, y = torch.randn(B, 60, 3), torch.randn(B, 70, 3)
    expected = chamfer._nearest(x, y)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(chamfer, 'TREE_POINTS', 1)
    assert torch.equal(chamfer._nearest(x, y), expected)
    monkeypatch.setattr(chamfer, 'tree_class', lambda: None)  # no scipy
    assert torch.equal(chamfer._nearest(x, y), expected)


def test_memory_is_bounded():
    """The largest tensor that comparing makes holds CHUNK distances, not all pairs."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    x = torch.randn(3, 511, 3)
    with Watch():
        chamfer._nearest(x, x)
    assert max(sizes) <= chamfer.CHUNK < 3 * 511 * 511


def test_compiled_it_is_the_same(backend):
    x, y = torch.randn(2, 9, 3), torch.randn(2, 8, 3)
    compiled = torch.compile(ops.chamfer_distance, backend='aot_eager', fullgraph=True)
    for norm in ('l1', 'l2'):
        eager = gradients(ops.chamfer_distance, x, y, norm=norm)
        for ours, expected in zip(gradients(compiled, x, y, norm=norm), eager):
            torch.testing.assert_close(ours, expected)


def test_published_numbers(reference):
    ref = reference('point_ops')
    a, b, expected = ref.inputs['set_a'], ref.inputs['set_b'], ref.expected
    torch.testing.assert_close(ops.nearest_squared(a, b), expected['chamfer_ab'], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ops.nearest_squared(b, a), expected['chamfer_ba'], atol=1e-6, rtol=1e-5)
    assert torch.equal(chamfer._nearest(a, b), expected['chamfer_idx_ab'].long())
    assert torch.equal(chamfer._nearest(b, a), expected['chamfer_idx_ba'].long())
    for norm in ('l1', 'l2'):
        torch.testing.assert_close(ops.chamfer_distance(a, b, norm), expected[f'chamfer_{norm}'], atol=1e-6, rtol=1e-5)


GOOD = torch.zeros(2, 4, 3)


@pytest.mark.parametrize('x, y, options, error, message', [
    (GOOD, GOOD, dict(norm='l3'), ValueError, r"norm='l3'.*'l1'"),
    (GOOD, GOOD, dict(reduction='max'), ValueError, r"reduction='max'.*'mean'"),
    (GOOD, GOOD[0], {}, ValueError, r'y must have the shape \(B, N, 3\), got \(4, 3\)'),
    (GOOD[..., :2], GOOD, {}, ValueError, r'x must have the shape'),
    (GOOD, GOOD[:1], {}, ValueError, 'x has 2 clouds and y 1'),
    (GOOD, GOOD[:, :0], {}, ValueError, r'y is empty: its shape is \(2, 0, 3\)'),
    (GOOD[:0], GOOD[:0], {}, ValueError, 'x is empty'),
    (GOOD / 0, GOOD, {}, ValueError, r'x has NaN .* \[0, 1\]'),
    (GOOD.long(), GOOD, {}, TypeError, 'x must be a floating point tensor, got torch.int64'),
    ([[0.]], GOOD, {}, TypeError, 'x must be a floating point tensor, got .*list'),
])
def test_refuses(x, y, options, error, message):
    with pytest.raises(error, match=message):
        ops.chamfer_distance(x, y, **options)
