"""Which backend serves an operator: argument, environment variable, device, dtype; what is refused."""
import sys

import pytest
import torch

from ewa3d import ops
from ewa3d.ops import backends

POINTS = torch.randn(2, 20, 3)
CALLS = {
    'fps': lambda points, **options: ops.fps(points, 5, **options),
    'knn': lambda points, **options: ops.knn(points, points, 3, **options)[1],
    'neighbours': lambda points, **options: ops.neighbours(points, points, 3, **options),
    'ball_query': lambda points, **options: ops.ball_query(points, points, 0.5, 3, **options),
    'chamfer_distance': lambda points, **options: ops.chamfer_distance(points, points + 1, **options),
    'nearest_squared': lambda points, **options: ops.nearest_squared(points, points + 1, **options),
}
each = pytest.mark.parametrize('call', CALLS.values(), ids=list(CALLS))


@pytest.fixture
def used(pytorch3d, monkeypatch):
    """The functions of pytorch3d that were called; no environment variable is set."""
    monkeypatch.delenv(backends.VARIABLE)
    module, names = sys.modules['pytorch3d.ops'], []

    def watched(function):
        return lambda *args, **kwargs: (names.append(function.__name__), function(*args, **kwargs))[1]
    for name in ('sample_farthest_points', 'knn_points', 'ball_query'):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return names


@each
def test_by_argument_and_by_variable(call, used, monkeypatch):
    expected = call(POINTS)
    assert not used  # 'auto' on a CPU
    for value in ('torch', ''):
        monkeypatch.setenv(backends.VARIABLE, value)
        assert torch.equal(call(POINTS), expected) and not used
    assert torch.equal(call(POINTS, backend='pytorch3d'), expected) and used  # the argument wins
    used.clear()
    monkeypatch.setenv(backends.VARIABLE, 'pytorch3d')
    assert torch.equal(call(POINTS, backend='torch'), expected) and not used
    assert torch.equal(call(POINTS), expected) and used


@each
def test_refused(call, pytorch3d, monkeypatch):
    with pytest.raises(ValueError, match=r"backend='pytorch3'; did you mean 'pytorch3d'"):
        call(POINTS, backend='pytorch3')
    with pytest.raises(ValueError, match="computes in single precision and was given float64"):
        call(POINTS.double(), backend='pytorch3d')
    monkeypatch.setenv(backends.VARIABLE, 'cuda')
    with pytest.raises(ValueError, match="the environment variable EWA3D_BACKEND='cuda'"):
        call(POINTS)
    for name in ('pytorch3d', 'pytorch3d.ops'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="backend='pytorch3d' needs pytorch3d"):
        call(POINTS, backend='pytorch3d')


def test_auto_is_pytorch3d_on_cuda_devices_alone(pytorch3d, monkeypatch):
    class Elsewhere:
        device, dtype = torch.device('cuda'), torch.float32

    class Double(Elsewhere):
        dtype = torch.float64

    monkeypatch.delenv(backends.VARIABLE)
    assert backends.pytorch3d_for('auto', Elsewhere) is sys.modules['pytorch3d.ops']
    assert backends.pytorch3d_for('auto', POINTS) is None
    assert backends.pytorch3d_for('auto', Elsewhere, Double) is None
    assert backends.pytorch3d_for('torch', Elsewhere) is None
    for name in ('pytorch3d', 'pytorch3d.ops'):
        monkeypatch.setitem(sys.modules, name, None)
    assert backends.pytorch3d_for('auto', Elsewhere) is None


@pytest.mark.parametrize('start', [0, 7, torch.tensor([3, 19])])
@pytest.mark.parametrize('scale', [1., 0.05, 1e-3])  # 1e-3: all within the radius of skip_origin
def test_fps_conventions_are_translated(pytorch3d, start, scale):
    points = POINTS * scale
    points[:, 12:] = points[:, :8]  # duplicates: after twelve picks nothing is left
    lengths = torch.tensor([20, 15])
    for options in (dict(), dict(skip_origin=True), dict(lengths=lengths), dict(lengths=lengths, skip_origin=True)):
        if 'lengths' in options and (isinstance(start, torch.Tensor) or start >= 15):
            continue
        found = [ops.fps(points, 15, start=start, backend=name, **options) for name in ('torch', 'pytorch3d')]
        assert torch.equal(*found), options


@pytest.mark.parametrize('scale', [1., 1e-25, 1e18, 1e25])  # squares leave the range of single precision
def test_knn_is_ranked_in_double_precision(pytorch3d, scale):
    points = torch.cat([POINTS, POINTS * (1 + 1e-7), POINTS[:, :5]], 1) * scale
    for k in (1, 4, 44, 45):
        for a, b in zip(*(ops.knn(points[:, ::3], points, k, backend=name) for name in ('torch', 'pytorch3d'))):
            assert torch.equal(a, b)


def test_gradients(pytorch3d):
    found = []
    for name in ('torch', 'pytorch3d'):
        x = POINTS.clone().requires_grad_()
        (ops.knn(x[:, :4], x, 3, backend=name)[0].sum() + ops.chamfer_distance(x, POINTS + 1, backend=name)).backward()
        found.append(x.grad)
    assert torch.equal(*found)


@each
def test_compiled_and_exported(call, pytorch3d):
    compiled = torch.compile(lambda points: call(points, backend='pytorch3d'), backend='eager', fullgraph=True)
    assert torch.equal(compiled(POINTS), call(POINTS, backend='torch'))
