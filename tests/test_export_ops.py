"""The forms of the point operators that exported graphs have, against the ones that run in torch."""
import pytest
import torch
from torch import nn

from ewa3d import ops
from ewa3d.ops import ball, sampling
from ewa3d.ops import points as points_module
from ewa3d.ops.interpolate import interpolation_weights, weighted_sum


def grid(side: int, batch: int = 2) -> torch.Tensor:
    """Points of a grid in random order, each of them twice: most distances tie."""
    axis = torch.arange(side) / 8
    points = torch.cartesian_prod(axis, axis, axis).repeat(2, 1)
    return torch.stack([points[torch.randperm(len(points))] for _ in range(batch)])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offset', [0., 100.])
@pytest.mark.parametrize('k', [1, 4, 23])
def test_neighbours_of_random_clouds(dtype, offset, k):
    points = torch.randn(2, 50, 3, dtype=dtype) + offset
    query = torch.cat([points[:, :6], points[:, :6] + 0.1], 1)
    assert torch.equal(points_module._neighbours_functional(query, points, k), ops.knn(query, points, k)[1])


@pytest.mark.parametrize('k', [1, 7, 30, 128])
def test_neighbours_that_tie_go_to_the_lowest_index(k):
    points = grid(4)
    assert torch.equal(points_module._neighbours_functional(points, points, k), ops.knn(points, points, k)[1])


@pytest.mark.parametrize(('points', 'num'), [(torch.randn(3, 40, 3), 17), (grid(3), 20), (torch.zeros(1, 5, 3), 5)])
@pytest.mark.parametrize('skip_origin', [False, True])
def test_farthest_points(points, num, skip_origin, monkeypatch):
    expected = ops.fps(points, num, skip_origin=skip_origin)
    monkeypatch.setattr(sampling, '_fps', lambda *args: sampling._fps_functional(*args[:4]))
    assert torch.equal(ops.fps(points, num, skip_origin=skip_origin), expected)


@pytest.mark.parametrize('radius', [0.05, 0.6, 5.])
@pytest.mark.parametrize('k', [1, 7, 60, 100])
def test_balls(radius, k, monkeypatch):
    points = torch.randn(2, 60, 3)
    query = torch.cat([points[:, :5], torch.randn(2, 4, 3), points[:, :2] + 100], 1)
    expected = ops.ball_query(query, points, radius, k)
    monkeypatch.setattr(ball.base, 'exporting', lambda: True)
    assert torch.equal(ball._first_hits(query, points, radius, k), expected)


@pytest.mark.parametrize(('S', 'C'), [(9, 4), (3, 7), (1, 2)])
def test_weighted_sums(S, C, monkeypatch):
    query, points, features = torch.randn(2, 11, 3), torch.randn(2, S, 3), torch.randn(2, S, C)
    index, weight = interpolation_weights(query, points)
    expected = weighted_sum(features, index, weight)
    monkeypatch.setitem(weighted_sum.__globals__, 'exporting', lambda: True)
    torch.testing.assert_close(weighted_sum(features, index, weight), expected)


class Operators(nn.Module):
    """Everything at once."""

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
        picks = ops.fps(points, 12, skip_origin=True)
        centers = ops.gather(points, picks)
        distance, near = ops.knn(centers, points, 5)
        balls = ops.ball_query(centers, points, 0.7, 6)
        return picks, distance, near, balls, ops.interpolate(points, centers, centers)


def test_ties_are_broken_in_onnxruntime_as_in_torch():
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package, reason=f'ONNX needs {package}')
    runtime = pytest.importorskip('onnxruntime', reason='running ONNX needs onnxruntime')
    points = grid(3)
    program = torch.export.export(Operators(), (points,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    session = runtime.InferenceSession(
        torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString())
    for batch in (1, 3):
        points = grid(3, batch)
        found = session.run(None, {session.get_inputs()[0].name: points.numpy()})
        for value, expected in zip(map(torch.from_numpy, found), Operators()(points), strict=True):
            torch.testing.assert_close(value, expected)


def test_graphs_need_torch_alone_and_take_any_size():
    torch._dynamo.reset()  # as `capture` does: the loop was traced with another number of points
    dim = torch.export.Dim
    program = torch.export.export(Operators(), (torch.randn(2, 30, 3),),
                                  dynamic_shapes=({0: dim('batch', min=1), 1: dim('points', min=12)},))
    assert not [n for n in program.graph.nodes if 'ewa3d' in str(n.target)]
    assert len(program.graph.nodes) < 200  # the loop is one node, not twelve times its body
    for batch, size in ((1, 12), (4, 47)):
        points = torch.randn(batch, size, 3)
        for found, expected in zip(program.module()(points), Operators()(points), strict=True):
            torch.testing.assert_close(found, expected)
