"""S4D gives the numbers of the published layer, and its weights go both ways."""
import pytest
import torch

from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.layers.ssm import S4D
from ewa3d.models.weights import layouts_of, load_plain, rename

TIGHT = dict(rtol=3e-5, atol=3e-5)


@pytest.fixture
def layer(reference):
    ref = reference('s4d')
    mixer = S4D(ref.meta['config']['d_model'], ref.meta['config']['d_state']).eval()
    report = load_plain(mixer, ref.path / 'checkpoint.pth')
    assert report.layout == 's4d' and not report.missing and not report.unexpected
    return ref, mixer


def test_kernel_output_and_gradients(layer):
    ref, mixer = layer
    for L in ref.meta['config']['lengths']:
        torch.testing.assert_close(mixer.kernel(L)[0], ref.expected[f'kernel_{L}'], **TIGHT)
        y = mixer(ref.inputs[f'u_{L}'].transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(y, ref.expected[f'y_{L}'], **TIGHT)
        mixer.zero_grad()
        y.square().mean().backward()
        found = rename({name: p.grad for name, p in mixer.named_parameters()}, 's4d', reverse=True)
        wanted = {key.partition('/')[2]: value for key, value in ref.expected.items() if key.startswith(f'grad_{L}/')}
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name].view_as(gradient), gradient, **TIGHT, msg=f'{name}, {L}')


@torch.no_grad()
def test_streaming_and_fused(layer):
    ref, mixer = layer
    u, expected = ref.inputs['u_64'], ref.expected['y_64']
    state, outputs = mixer.initial_state(len(u)), []
    for token in u.unbind(-1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, -1), expected, **TIGHT)
    torch.testing.assert_close(mixer.fuse(64)(u.transpose(1, 2)).transpose(1, 2), expected, **TIGHT)


def test_names_both_ways(layer):
    ref, mixer = layer
    state = read_checkpoint(ref.path / 'checkpoint.pth')['model']
    assert layouts_of(state) == ['s4d'] and layouts_of(mixer.state_dict(), reverse=True) == ['s4d']
    back = rename(mixer.state_dict(), 's4d', reverse=True)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
