"""A module with other tensors: nothing of the module itself changes but what its forward does to attributes."""
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ewa3d import expand
from ewa3d.layers.experts import EWAFFN
from ewa3d.layers.standin import run_with


class Odd(nn.Module):
    """References beside the registered ones, state that the forward writes, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.a
        self.norm = nn.BatchNorm1d(4)
        self.order = [self.a, self.b]
        self.table = {'act': torch.tanh, 'last': (self.b,)}
        self.call = self.inner
        self.register_buffer('seen', torch.zeros(()))
        self.calls = 0

    def inner(self, x):
        for layer in self.order:
            x = self.table['act'](layer(x))
        return self.table['last'][0](self.again(x))

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + 1
        return self.norm(self.call(x))


@pytest.mark.parametrize('training', [False, True])
def test_equals_the_functional_call(training):
    module, x = Odd().train(training), torch.randn(5, 4)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    others = {name: torch.randn_like(t).abs() if t.is_floating_point() else t.clone() for name, t in own.items()}
    replaced = {id(own[name]): value.clone() for name, value in others.items()}
    y = run_with(module, replaced, x)
    assert module.calls == 1 and module.order[0] is module.a is module.again
    assert all(t is own[name] for name, t in [*module.named_parameters(), *module.named_buffers()])
    torch.testing.assert_close(y, functional_call(module, others, (x,)))
    for name, value in others.items():  # BatchNorm's statistics in place, the counter anew
        torch.testing.assert_close(replaced[id(own[name])], value)


def test_mode_gradients_and_hooks():
    module, x, heard = Odd(), torch.randn(5, 4), []
    module.a.register_forward_hook(lambda m, args, y: heard.append(m.training))
    tensors = {id(t): t.detach().clone().requires_grad_(t.requires_grad)
               for t in (*module.parameters(), *module.buffers())}
    run_with(module, tensors, x, training=False).sum().backward()
    assert heard == [False, False] and module.training and module.a.training
    assert all(tensors[id(p)].grad is not None and p.grad is None for p in module.parameters())


def make_shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.GELU(), layer)


@pytest.mark.parametrize('make', [make_shared, lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.Linear(6, 6))])
def test_eval_leaves_the_experts_alone(make):
    model = nn.Sequential(nn.Identity(), make()).eval()
    x = torch.randn(15, 6)
    plain = model(x)
    expand(model, dict(type='EWAFFN', at='1', num_experts=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.testing.assert_close(model(x), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()(x).sum().backward()
    assert all(p.grad.shape[0] == 3 for p in model.parameters())


def test_threads_may_share_a_model_in_eval():
    model = nn.Sequential(Odd(), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))).eval()
    expand(model, [dict(type='EWAFFN', at=at, num_experts=2) for at in ('0', '1')])
    shapes, x = [tuple(p.shape) for p in model.parameters()], torch.randn(7, 4)
    expected, failures = model(x), []

    def work():
        for _ in range(30):
            try:
                with torch.no_grad():
                    torch.testing.assert_close(model(x), expected)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [tuple(p.shape) for p in model.parameters()] == shapes


class ChannelsFirst(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(16, 32, 1), nn.GELU(), nn.Conv1d(32, 16, 1))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(x) + 0.1 * x.mean(-2, keepdim=True)


class WithExtra(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x, scale, shift=0.):
        return self.fc(x) * scale + shift


class Pair(WithExtra):
    def forward(self, x):
        return self.fc(x), x


class Inside(nn.Module):
    """1×1 convolutions with the transposes inside are an FFN of tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Noisy(WithExtra):
    def forward(self, x):
        return nn.functional.dropout(self.fc(x), 0.5)


@pytest.mark.parametrize(('plain', 'shape', 'match'), [
    (ChannelsFirst, (4, 16, 10), 'ChannelsFirst does not t.*channels first'),
    (ChannelsFirst, (2, 16, 16), 'ChannelsFirst does not t.*channels first'),
    (Mixing, (2, 5, 16), 'Mixing does not treat every token'), (Pair, (2, 5, 16), 'returns a tuple')])
def test_what_is_no_ffn_of_tokens_is_refused_in_training(plain, shape, match):
    module = EWAFFN.expand(plain())
    x = torch.randn(shape)
    module.eval()(x)  # the mean expert runs whatever the plain one does
    with pytest.raises(TypeError, match=match):
        module.train()(x)


def test_torchs_own_encoder_layer_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(ValueError, match=r'layers\.0\.linear1.*TransformerEncoderLayer'):
        expand(model, dict(type='EWAFFN', at='layers.*.linear1'))
    with pytest.raises(ValueError, match='ModuleList has no forward'):
        expand(model, dict(type='EWAFFN', at='layers'))


def test_more_than_tokens():
    plain = WithExtra()
    module, x = EWAFFN.expand(plain, num_experts=2), torch.randn(3, 4, 16)
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(x, 2., shift=1.), plain(x, 2., shift=1.))
    with pytest.raises(TypeError, match='tensors beside the tokens'):
        EWAFFN.expand(plain)(x, torch.ones(3, 4, 1))


@pytest.mark.parametrize('plain', [Inside, Noisy])
def test_unusual_ffns_of_tokens_train(plain):
    module, x = EWAFFN.expand(plain(), num_experts=2), torch.randn(3, 4, 16)
    state = torch.get_rng_state()
    module.try_plain(x, (), {})
    assert torch.equal(state, torch.get_rng_state())
    module(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


def test_hooks_and_layers_that_come_later_are_seen():
    module, x, heard = EWAFFN.expand(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))), torch.randn(9, 6), []
    assert module.fast
    handle = module.get_submodule('0').register_forward_hook(lambda *_: heard.append(1))
    assert not module.fast
    module(x)
    heard.clear()
    module(x)
    assert len(heard) == 4  # once an expert
    handle.remove()
    assert module.fast


def test_keys_of_older_releases_load_as_into_the_plain_module():
    torchvision = pytest.importorskip('torchvision')
    block = torchvision.models.vision_transformer.MLPBlock(8, 16, 0.)
    model = nn.Sequential(nn.Identity(), block)
    old = {key.replace('1.0.', '1.linear_1.').replace('1.3.', '1.linear_2.'): torch.randn_like(value)
           for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8)
    model.load_state_dict(dict(old))
    expected = model.eval()(x)
    expand(model, dict(type='EWAFFN', at='1'))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(dict(old))
    torch.testing.assert_close(model(x), expected)
