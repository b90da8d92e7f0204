"""The three laws of a Reparam, over every registered one and models of several makes."""
import copy

import pytest
import torch
from torch import nn
from toys import MODELS as TOY_MODELS
from toys import PLACES, make_model, train_steps

from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam, expand, fuse


def _reparams() -> list[str]:
    MODELS.import_from_location()
    classes = {name: cls for name, cls in MODELS.module_dict.items() if isinstance(cls, type)}
    return sorted(name for name, cls in classes.items() if issubclass(cls, Reparam))


# RePaFFN: the FFNs that have idle channels are two linear maps.
FITTING = dict(PLACES, RePaFFN=('own, ours', 'timm ViT', 'torchvision ViT'))
CASES = [(name, model) for name in _reparams() for model in FITTING.get(name, TOY_MODELS)]


def test_the_registry_has_reparams():
    assert {'EWAFFN', 'MoEFFN', 'ResidualMoEFFN', 'FusionFFN', 'RePaFFN'} <= set(_reparams())


@pytest.fixture(params=CASES, ids=lambda case: f'{case[0]}-{case[1]}')
def case(request):
    name, model_name = request.param
    model, at, x = make_model(model_name)
    train_steps(model, x, steps=1)  # so that norms and buffers are not at their defaults
    at, cfg = PLACES.get(name, {}).get(model_name, (at, {}))
    return MODELS.get(name), model, dict(type=name, at=at, every=2, **cfg), x


def test_expand_keeps_the_function(case):
    cls, model, rule, x = case
    if not cls.preserves:
        pytest.skip(f'{cls.__name__} does not preserve')
    before = model.eval()(x)
    expand(model, rule)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_fuse_keeps_the_function_after_training(case):
    _, model, rule, x = case
    expand(model, rule)
    train_steps(model, x)
    before = model.eval()(x)
    report = fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    kept = {row.name for row in report if row.status == 'kept'}
    left = {name for name, module in model.named_modules() if isinstance(module, Reparam)}
    assert left == kept


def test_plain_checkpoint_loads_into_the_expanded_model(case):
    cls, model, rule, x = case
    plain = copy.deepcopy(model)
    expand(model, rule)
    own = {name for name, module in model.named_modules() if isinstance(module, Reparam)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = model.load_state_dict(plain.state_dict(), strict=cls.__name__ == 'EWAFFN')
    assert not found.unexpected_keys
    assert all(any(key.startswith(f'{name}.') for name in own) for key in found.missing_keys)
    if cls.preserves and not found.missing_keys:
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)


def test_fused_model_is_the_plain_one(case):
    cls, model, rule, x = case
    if cls.has_fused_form:
        pytest.skip('fuses to a form of its own')
    plain = copy.deepcopy(model)
    expand(model, rule)
    train_steps(model, x)
    if any(row.status == 'kept' for row in fuse(model)):
        pytest.skip('does not fuse to the plain class')
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert (p.shape, p.dtype, p.device, p.requires_grad) == (q.shape, q.dtype, q.device, q.requires_grad), name
    train_steps(model, x)  # and it trains on


def test_float32_law(case):
    cls, model, rule, x = case
    model, x = model.float(), x.float()
    before = model.eval()(x)
    expand(model, rule)
    if cls.preserves:
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    fuse(model)
    assert model(x).dtype == torch.float32
    assert isinstance(model, nn.Module)
