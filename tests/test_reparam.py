"""expand and fuse: which modules a rule means, composition, atomicity, reports, wrapped models, errors."""
import copy
import logging

import pytest
import torch
from torch import nn
from toys import FFNS, OwnModel

from ewa3d.layers.block import Mlp
from ewa3d.layers.experts import EWAFFN
from ewa3d.reparam import Reparam, expand, fuse


class Doubled(Reparam):
    """A linear layer as the sum of two."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    @classmethod
    def expand(cls, plain, share: float = 0.25):
        first, second = copy.deepcopy(plain), copy.deepcopy(plain)
        with torch.no_grad():
            for part, factor in ((first, share), (second, 1 - share)):
                for parameter in part.parameters():
                    parameter.mul_(factor)
        return cls(first, second)

    def forward(self, x):
        return self.first(x) + self.second(x)

    @torch.no_grad()
    def fuse(self):
        plain = copy.deepcopy(self.first)
        for own, other in zip(plain.parameters(), self.second.parameters()):
            own.add_(other)
        return plain


class Staying(Reparam):
    """Wraps a module and stays."""
    accepts = ('Doubled',)

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @classmethod
    def expand(cls, plain):
        return cls(plain)

    def forward(self, x):
        return self.inner(x)

    def fuse(self):
        return self


class Broken(Reparam):
    @classmethod
    def expand(cls, plain):
        if plain.out_features == 12:
            raise ValueError('cannot do this one')
        return Doubled.expand(plain)


def _model(depth=4) -> OwnModel:
    return OwnModel(FFNS['ours'], depth=depth)


def _expanded(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Reparam)]


@pytest.mark.parametrize('which, chosen', [
    ({}, [0, 1, 2, 3]), (dict(every=2), [1, 3]), (dict(every=3), [2]), (dict(every=4), [3]), (dict(last=1), [3]),
    (dict(last=2), [2, 3]), (dict(index=[0, -1]), [0, 3]), (dict(index=[2, 0, 2]), [0, 2]),
    (dict(every=None), [0, 1, 2, 3]),
])
def test_which_matches(which, chosen):
    model = _model()
    report = expand(model, [dict(type='EWAFFN', at='blocks.*.mlp', **which)])
    assert [row.name for row in report] == [f'blocks.{i}.mlp' for i in chosen] == _expanded(model)


def test_numbers_count_in_order():
    model = _model(depth=12)
    report = expand(model, dict(type=EWAFFN, at='blocks.*.mlp', every=4))
    assert [row.name for row in report] == ['blocks.3.mlp', 'blocks.7.mlp', 'blocks.11.mlp']


@pytest.mark.parametrize('at, count', [('blocks.*.mlp.fc1', 4), ('blocks.1.mlp.fc*', 2), ('blocks.?.mlp.fc?', 8),
                                       ('head', 1)])
def test_star_stops_at_dots(at, count):
    assert len(expand(_model(), dict(type=Doubled, at=at))) == count


@pytest.mark.parametrize('at', ['*.mlp', 'blocks*mlp', 'mlp', 'blocks.*.mlp.', 'backbone.blocks.*.mlp', 'blocks.*.ml'])
def test_pattern_that_matches_nothing(at):
    with pytest.raises(ValueError, match='matches no module'):
        expand(_model(), dict(type='EWAFFN', at=at))


def test_no_match_names_near_modules():
    with pytest.raises(ValueError, match=r'matches no module.*blocks\.\*\.mlp'):
        expand(_model(), [dict(type='EWAFFN', at='block.*.mlp')])


@pytest.mark.parametrize('rule, error, message', [
    (dict(at='head'), TypeError, "'type' is missing"),
    (dict(type='EWAFFN'), TypeError, "'at' is missing"),
    (dict(type='EWAFN', at='head'), KeyError, 'EWAFFN'),
    (dict(type=nn.Linear, at='head'), TypeError, 'no Reparam'),
    (dict(type='Mlp', at='head'), (TypeError, KeyError), 'Mlp'),
    (dict(type='EWAFFN', at='head', num_expert=4), TypeError, "did you mean 'num_experts'"),
    (dict(type='EWAFFN', at='head', evry=4), TypeError, "'every'"),
    (dict(type='EWAFFN', at='head', plain=4), TypeError, "unknown key 'plain'"),
    (dict(type='EWAFFN', at='blocks.*.mlp', every=0), ValueError, 'positive integer'),
    (dict(type='EWAFFN', at='blocks.*.mlp', every=True), ValueError, 'positive integer'),
    (dict(type='EWAFFN', at='blocks.*.mlp', every=5), ValueError, 'selects nothing of 4'),
    (dict(type='EWAFFN', at='blocks.*.mlp', last=5), ValueError, 'only 4 matches'),
    (dict(type='EWAFFN', at='blocks.*.mlp', index=[4]), ValueError, 'out of range'),
    (dict(type='EWAFFN', at='blocks.*.mlp', index=[]), ValueError, 'list of positions'),
    (dict(type='EWAFFN', at='blocks.*.mlp', index=1), ValueError, 'list of positions'),
    (dict(type='EWAFFN', at='blocks.*.mlp', every=2, last=1), ValueError, 'one of every, last and index'),
    (dict(type='EWAFFN', at=''), TypeError, 'module name'),
    ('EWAFFN', TypeError, 'expected a dict'),
])
def test_wrong_rules(rule, error, message):
    model = _model()
    before = list(model.modules())
    with pytest.raises(error, match=message):
        expand(model, [dict(type='EWAFFN', at='blocks.0.mlp'), rule])
    assert list(model.modules()) == before


def test_an_error_in_the_middle_changes_nothing():
    model = _model()
    before, state = list(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='cannot do this one'):
        expand(model, [dict(type=Doubled, at='head'), dict(type='EWAFFN', at='blocks.0.mlp'),
                       dict(type=Broken, at='blocks.1.mlp.fc*')])
    assert list(model.named_modules()) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class Failing(Reparam):
    error: Exception

    @classmethod
    def expand(cls, plain, **cfg):
        raise cls.error


@pytest.mark.parametrize('cfg, error, message', [
    (dict(num_experts=1), ValueError, 'num_experts must be at least 2, got 1'),
    (dict(num_experts='4'), TypeError, "num_experts .*'4'"), (dict(partition='btach'), ValueError, 'btach')])
def test_errors_of_expand_name_rule_and_module(cfg, error, message):
    rules = [dict(type='EWAFFN', at='head'), dict(type='EWAFFN', at='blocks.*.mlp', every=2, **cfg)]
    with pytest.raises(error, match=rf"^rule 1 \(EWAFFN at 'blocks\.\*\.mlp'\): 'blocks\.1\.mlp': .*{message}"):
        expand(_model(), rules)


@pytest.mark.parametrize('error', [KeyError('gone'), OSError(2, 'no such thing'), RuntimeError(),
                                   UnicodeDecodeError('utf-8', b'x', 0, 1, 'odd')])
def test_errors_of_expand_keep_their_type(error, monkeypatch):
    monkeypatch.setattr(Failing, 'error', error, raising=False)
    with pytest.raises(type(error)) as caught:
        expand(_model(), dict(type=Failing, at='head'))
    assert caught.value is error


def test_expand_must_return_a_reparam(monkeypatch):
    monkeypatch.setattr(Failing, 'expand', lambda plain: plain)
    with pytest.raises(TypeError, match=r"rule 0.*'head'.*returned Linear"):
        expand(_model(), dict(type=Failing, at='head'))


def test_two_rules_on_one_module_need_acceptance():
    with pytest.raises(ValueError, match='already a EWAFFN, which Doubled does not accept'):
        expand(_model(), [dict(type='EWAFFN', at='blocks.*.mlp'), dict(type=Doubled, at='blocks.1.mlp')])
    with pytest.raises(ValueError, match=r"inside 'blocks.1.mlp', which is already a EWAFFN"):
        expand(_model(), [dict(type='EWAFFN', at='blocks.*.mlp'), dict(type=Doubled, at='blocks.1.mlp.fc1')])
    with pytest.raises(ValueError, match='already a EWAFFN'):
        expand(_model(), [dict(type='EWAFFN', at='blocks.*.mlp'), dict(type='EWAFFN', at='blocks.*.mlp')])
    model = _model()
    report = expand(model, [dict(type=Doubled, at='head'), dict(type=Staying, at='head')])
    assert [(r.name, r.before, r.after) for r in report] == [('head', 'Linear', 'Staying')]
    assert isinstance(model.head.inner, Doubled)


def test_second_call_sees_the_first():
    model = _model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    with pytest.raises(ValueError, match='already a EWAFFN'):
        expand(model, dict(type='EWAFFN', at='blocks.0.mlp'))


def test_nested_average_first_fold_after():
    """Inside EWA, another Reparam is stacked; fusing averages it and folds it after."""
    model, x = _model().double(), torch.randn(2, 7, 12, dtype=torch.float64)
    keys, before = list(model.state_dict()), model.eval()(x)
    expand(model, [dict(type=Doubled, at='blocks.*.mlp.fc2'), dict(type='EWAFFN', at='blocks.*.mlp', num_experts=3)])
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-13)
    assert model.blocks[0]['mlp'].fc2.first.weight.shape == (3, 12, 20)
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before = model.eval()(x)
    report = fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == keys
    assert {row.name: row.before for row in report}['blocks.0.mlp.fc2'] == 'Doubled'


def test_kept_is_reported_and_what_is_inside_is_fused():
    model, x = _model(), torch.randn(2, 7, 12)
    expand(model, [dict(type=Doubled, at='head'), dict(type=Staying, at='head'),
                   dict(type='EWAFFN', at='blocks.0.mlp')])
    before = model.eval()(x)
    report = {row.name: (row.status, row.before, row.after) for row in fuse(model)}
    assert report == {'blocks.0.mlp': ('fused', 'EWAFFN', 'Mlp'), 'head': ('kept', 'Staying', 'Staying'),
                      'head.inner': ('fused', 'Doubled', 'Linear')}
    torch.testing.assert_close(model(x), before)


def test_fuse_without_reparams_is_an_empty_report():
    model = _model()
    assert len(fuse(model)) == 0


def test_shared_module_is_replaced_everywhere_by_one():
    model = nn.ModuleDict(dict(a=nn.ModuleDict(dict(mlp=Mlp(12, 20))), b=nn.ModuleDict(dict(other=nn.Identity()))))
    model['b']['mlp'] = model['a']['mlp']
    report = expand(model, dict(type='EWAFFN', at='b.mlp'))  # found under its second name too
    assert len(report) == 1
    assert model['a']['mlp'] is model['b']['mlp']
    assert isinstance(model['a']['mlp'], EWAFFN)
    assert len(expand(nn.ModuleList([nn.Linear(2, 2)] * 3), dict(type=Doubled, at='*'))) == 1
    fuse(model)
    assert model['a']['mlp'] is model['b']['mlp']
    assert type(model['a']['mlp']) is Mlp


def test_parameters_shared_between_modules_are_refused():
    model = _model()
    model.blocks[1]['mlp'].fc1.weight = model.blocks[0]['mlp'].fc1.weight
    before = list(model.modules())
    with pytest.raises(ValueError, match=r'blocks\.1\.mlp\.fc1\.weight.*untie'):
        expand(model, dict(type='EWAFFN', at='blocks.0.mlp'))
    assert list(model.modules()) == before


def test_mode_flags_dtype_are_kept():
    model = _model().to(torch.bfloat16)
    model.blocks[0].eval()
    model.blocks[0]['mlp'].fc1.bias.requires_grad_(False)
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    assert [model.blocks[i]['mlp'].training for i in range(4)] == [False, True, True, True]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.blocks[1]['mlp'].fc2.weight.requires_grad_(False)
    fuse(model)
    assert [model.blocks[i]['mlp'].training for i in range(4)] == [False, True, True, True]
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ['blocks.0.mlp.fc1.bias', 'blocks.1.mlp.fc2.weight']
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_inner_modes_survive():
    model = _model()
    model.blocks[0]['mlp'].drop1.eval()
    expand(model, dict(type='EWAFFN', at='blocks.0.mlp'))
    assert model.blocks[0]['mlp'].training
    assert not model.blocks[0]['mlp'].drop1.training
    fuse(model)
    assert model.blocks[0]['mlp'].training
    assert not model.blocks[0]['mlp'].drop1.training


def test_hooks_move_with_the_module():
    model, calls = _model(), []
    handle = model.blocks[0]['mlp'].register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    x = torch.randn(2, 7, 12)
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    model(x), model.eval()(x)
    fuse(model)
    model(x)
    assert calls == ['EWAFFN', 'EWAFFN', 'Mlp']
    handle.remove()
    model(x)
    assert len(calls) == 3


def test_report_is_a_table():
    model = _model()
    report = expand(model, dict(type='EWAFFN', at='blocks.*.mlp', every=2, num_experts=3))
    ffn = 12 * 20 + 20 + 20 * 12 + 12
    assert [tuple(row) for row in report] == [(f'blocks.{i}.mlp', 'Mlp', 'EWAFFN', ffn, 3 * ffn, 'expanded')
                                              for i in (1, 3)]
    assert report.params_after - report.params_before == 4 * ffn
    assert report.params_after == sum(p.numel() for p in model.parameters())
    lines = str(report).splitlines()
    assert 'blocks.1.mlp' in lines[2]
    assert f'{report.params_after:,}' in lines[-1]
    assert str(fuse(nn.Sequential(nn.ReLU())))


def test_a_model_that_is_itself_a_reparam():
    module = EWAFFN.expand(Mlp(12, 20))
    with pytest.raises(ValueError, match=r'model = model\.fuse\(\)'):
        fuse(module)
    assert type(module.fuse()) is Mlp


@pytest.mark.parametrize('wrap, path', [
    (lambda m: nn.DataParallel(m), r'model\.module'),
    (lambda m: torch.compile(m, backend='eager'), r'model\._orig_mod'),
    (lambda m: nn.Sequential(torch.compile(m, backend='eager')), r'model\.0\._orig_mod'),
])
def test_wrapped_models_are_refused(wrap, path):
    model = _model()
    expand(model, dict(type='EWAFFN', at='blocks.0.mlp'))
    for action in (fuse, lambda m: expand(m, dict(type='EWAFFN', at='*'))):
        with pytest.raises(ValueError, match=path):
            action(wrap(model))
    assert _expanded(model) == ['blocks.0.mlp']


def test_fuse_warns_of_a_stale_optimizer(caplog):
    model = _model()
    expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    with caplog.at_level(logging.WARNING, logger='ewa3d'):
        fuse(model)
    assert 'optimizer' in caplog.text
    caplog.clear()
    fuse(model)
    assert not caplog.text


def test_failing_fuse_changes_nothing(monkeypatch):
    model = _model()
    expand(model, [dict(type='EWAFFN', at='blocks.*.mlp'), dict(type=Doubled, at='head')])
    before = list(model.named_modules())
    monkeypatch.setattr(Doubled, 'fuse', lambda self: None)
    with pytest.raises(TypeError, match=r"Doubled\.fuse\(\) of 'head'"):
        fuse(model)
    assert list(model.named_modules()) == before


def test_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError, match='expand'):
        expand(_model(), dict(type=Reparam, at='head'))
