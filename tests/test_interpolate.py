"""Interpolation between point sets against loops that follow the definition."""
import pytest
import torch

from ewa3d.ops import interpolate
from ewa3d.ops.interpolate import interpolation_weights, weighted_sum


def naive(query, points, features, k=3):
    """One query at a time, differentiable."""
    clouds = []
    for q, p, f in zip(query, points, features):
        rows = []
        for x in q:
            distance = (p - x).square().sum(-1)
            near = sorted(range(len(p)), key=lambda i: (distance[i].item(), i))[:k]
            weights = [1 / (distance[i] + 1e-8) for i in near]
            rows.append(sum(w * f[i] for w, i in zip(weights, near)) / sum(weights))
        clouds.append(torch.stack(rows))
    return torch.stack(clouds)


def case(B, N, S, C, dtype=torch.float64):
    return torch.randn(B, N, 3, dtype=dtype), torch.randn(B, S, 3, dtype=dtype), torch.randn(B, S, C, dtype=dtype)


@pytest.mark.parametrize('B, N, S, C, k', [(2, 17, 9, 5, 3), (1, 6, 2, 4, 3), (3, 5, 1, 2, 3), (2, 8, 6, 11, 4),
                                           (1, 1, 40, 3, 3)])
def test_naive_forward_and_backward(B, N, S, C, k):
    inputs = [x.requires_grad_() for x in case(B, N, S, C)]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    found, expected = interpolate(*inputs, k=k), naive(*twins, k=k)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    found.backward(gradient)
    expected.backward(gradient)
    for x, twin in zip(inputs, twins):
        torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize('B, N', [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nothing_to_interpolate(B, N, dtype):
    query, points, features = case(B, N, 4, 6, torch.float32)
    found = interpolate(query, points, features.to(dtype).requires_grad_())
    assert found.shape == (B, N, 6) and found.dtype == dtype
    found.sum().backward()


def test_point_ops_fixture(reference):
    ref = reference('point_ops')
    points, centres = ref.inputs['points'], ref.expected['centres']
    found = interpolate(points, centres, ref.inputs['centre_features'])
    torch.testing.assert_close(found, ref.expected['interpolated'], atol=3e-5, rtol=3e-5)


def test_a_point_that_is_there_keeps_its_features():
    points, features = torch.randn(2, 30, 3), torch.randn(2, 30, 4)
    torch.testing.assert_close(interpolate(points, points, features), features, atol=1e-4, rtol=1e-4)
    far = points + 1000  # coordinates far from the origin lose nothing but their own digits
    torch.testing.assert_close(interpolate(far, far, features), features, atol=1e-3, rtol=1e-3)


def test_duplicates_share():
    points = torch.zeros(1, 5, 3)
    points[0, 4] = 9.
    features = torch.tensor([[[1.], [2.], [6.], [100.], [7.]]])
    found = interpolate(torch.tensor([[[0., 0, 0], [9, 0, 0]]]), points, features)
    torch.testing.assert_close(found[0, 0], torch.tensor([3.]))  # the three first of four equally near ones
    assert found.isfinite().all()


def test_weights_sum_to_one_and_come_nearest_first():
    query, points, _ = case(2, 20, 15, 1, torch.float32)
    index, weight = interpolation_weights(query, points)
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 20))
    assert index.shape == (2, 20, 3) and bool((weight.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('S, C', [(4, 9), (9, 4)])  # a matrix product, and sums of rows
def test_half_precision(dtype, S, C):
    query, points, features = (x.to(dtype) for x in case(2, 7, S, C))
    found = interpolate(query, points, features.requires_grad_())
    found.sum().backward()
    assert found.dtype == dtype and features.grad.dtype == dtype
    expected = naive(query.double(), points.double(), features.detach().double())
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.05)


def test_both_forms_agree():
    features = torch.randn(2, 5, 8, dtype=torch.bfloat16).requires_grad_()
    index, weight = interpolation_weights(torch.randn(2, 6, 3), torch.randn(2, 5, 3))
    product = weighted_sum(features, index, weight)
    rows = weighted_sum(features.detach().float(), index, weight)
    torch.testing.assert_close(product.float(), rows, atol=0.05, rtol=0.05)


def test_errors():
    query, points, features = case(2, 7, 5, 3)
    with pytest.raises(ValueError, match=r'no point to take features from.*\(2, 0, 3\)'):
        interpolate(query, points[:, :0], features[:, :0])
    for features_shape in ((3, 5, 3), (2, 7, 3), (2, 5)):
        with pytest.raises(ValueError, match=r'points .B, S, 3. and .* got \(2, 5, 3\)'):
            interpolate(query, points, torch.zeros(features_shape))
    with pytest.raises(ValueError, match='2 sets of queries for 1 clouds'):
        interpolate(query, points[:1], features[:1])
    with pytest.raises(ValueError, match='NaN'):
        interpolate(query, points.fill_(float('nan')), features)
