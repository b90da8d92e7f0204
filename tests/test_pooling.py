"""patch_max against torch's amax, forward and backward."""
import pytest
import torch

from ewa3d.ops import patch_max


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1, 1, 1), (7, 5, 3), (16, 32, 24)])
def test_equals_amax_forward_and_backward(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    x[:, -1] = x[:, 0]  # ties share the gradient
    ours, naive = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(shape[0], shape[2], dtype=dtype)
    out, expected = patch_max(ours), naive.amax(1)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(out, expected)
    torch.testing.assert_close(ours.grad, naive.grad)


def test_gradient_is_numerically_right():
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(patch_max, x)


def test_no_graph_break_under_compile():
    x = torch.randn(3, 4, 2, requires_grad=True)
    torch.compile(patch_max, fullgraph=True, backend='aot_eager')(x).sum().backward()
    expected, = torch.autograd.grad(x.amax(1).sum(), x)
    torch.testing.assert_close(x.grad, expected)
