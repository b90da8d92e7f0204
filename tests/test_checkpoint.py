"""Checkpoints: round trip, atomic writing, damage, hostile files, loading errors."""
import argparse
import contextlib
import json
import os
import pickle
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from ewa3d.engine.checkpoint import (
    FORMAT_VERSION,
    find_last_checkpoint,
    load_model_state,
    read_checkpoint,
    select_weights,
    write_checkpoint,
)
from ewa3d.engine.plain import checksum, to_plain
from ewa3d.registry import MODELS
from ewa3d.reparam import expand

STATE = {'a.weight': torch.arange(6.0).view(2, 3), 'b': torch.tensor(3), 'c': torch.randn(4).bfloat16(),
         'd': torch.zeros(0, 2), 'e': torch.tensor([True, False])}


def write(tmp_path, name='x.pth', **parts):
    meta = dict(epoch=3, cfg=dict(model=dict(type='M', sizes=(1, 2))))
    return write_checkpoint(tmp_path / name, STATE, meta, **parts)


def test_round_trip(tmp_path):
    optimizer = dict(state={0: dict(step=torch.tensor(2.0), m=torch.randn(3))}, param_groups=[dict(lr=0.1, params=[0])])
    path = write(tmp_path, optimizer=optimizer, rng=[dict(python=[3, [1], None])], odd=(1, 'x', None, Counter('aab')))
    back = read_checkpoint(path)
    assert back['format_version'] == FORMAT_VERSION and len(back['checksum']) == 64
    assert back['meta'] == dict(epoch=3, cfg=dict(model=dict(type='M', sizes=[1, 2])))
    for key, value in STATE.items():
        assert back['state_dict'][key].dtype == value.dtype and torch.equal(back['state_dict'][key], value)
    assert torch.equal(back['optimizer']['state'][0]['m'], optimizer['state'][0]['m'])
    assert back['odd'] == (1, 'x', None, Counter('aab'))


def test_safetensors_round_trip(tmp_path):
    tied = torch.randn(3)
    path = write_checkpoint(tmp_path / 'x.safetensors', dict(STATE, one=tied, two=tied), dict(epoch=3))
    back = read_checkpoint(path)
    assert back['meta'] == dict(epoch=3) and torch.equal(back['state_dict']['two'], tied)
    assert torch.equal(back['state_dict']['c'], STATE['c'])
    with pytest.raises(ValueError, match='weights only, not optimizer'):
        write_checkpoint(tmp_path / 'y.safetensors', STATE, optimizer={})


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    big = torch.zeros(1000, 1000)
    path = write_checkpoint(tmp_path / 'x.pth', dict(a=big[0]))
    assert path.stat().st_size < 50_000 and torch.equal(read_checkpoint(path)['state_dict']['a'], big[0])


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = write(tmp_path)
    before = path.read_bytes()

    def failing(obj, file):
        file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', failing)
    with pytest.raises(OSError, match='disk full'):
        write(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['x.pth']


def test_unstorable_values_are_named(tmp_path):
    with pytest.raises(TypeError, match=r'param_schedulers\[0\]\.hook is a object'):
        write(tmp_path, param_schedulers=[dict(hook=object())])
    with pytest.raises(TypeError, match=r'meta\.cfg\.x is a object'):
        write_checkpoint(tmp_path / 'x.pth', STATE, dict(cfg=dict(x=object())))
    with pytest.raises(ValueError, match=r'\.pth or \.safetensors'):
        write_checkpoint(tmp_path / 'x.bin', STATE)
    assert not list(tmp_path.iterdir())


def test_to_plain():
    value = {'a': (1, np.float32(2.5)), 3: np.arange(2), 'f': nn.Linear, 's': {'b', 'a'}, 'd': torch.float32}
    plain = to_plain(value)
    assert plain == {'a': [1, 2.5], '3': [0, 1], 'f': 'Linear', 's': ['a', 'b'], 'd': 'torch.float32'}
    json.dumps(plain)


# ---- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_damaged_files(tmp_path, suffix):
    path = write(tmp_path, f'x.{suffix}')
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match='nothing'):
        read_checkpoint(tmp_path / f'nothing.{suffix}')
    with pytest.raises(ValueError, match='is not a file'):
        read_checkpoint(tmp_path)
    for content in (b'', whole[:len(whole) // 2], whole[:20], b'\0' * 1000, b'not a checkpoint at all' * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'x.{suffix}'):
            read_checkpoint(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    checkpoint = torch.load(write(tmp_path), weights_only=True)
    checkpoint['state_dict']['a.weight'][0, 0] += 1
    torch.save(checkpoint, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='checksum'):
        read_checkpoint(tmp_path / 'x.pth')
    path = write(tmp_path, 'x.safetensors')
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match='checksum'):
        read_checkpoint(path)


def test_checksum_covers_everything_but_not_the_order(tmp_path):
    one = dict(format_version=1, meta=dict(a=1, b=2), state_dict=dict(x=torch.ones(2), y=torch.zeros(2)))
    other = dict(state_dict=dict(y=torch.zeros(2), x=torch.ones(2)), meta=dict(b=2, a=1), format_version=1)
    assert checksum(one) == checksum(other)
    variants = [dict(one, meta=dict(a=1, b=3)), dict(one, extra=1), dict(one, meta=dict(a=1, b='2')),
                dict(one, state_dict=dict(x=torch.ones(2), z=torch.zeros(2))),
                dict(one, state_dict=dict(x=torch.ones(2, 1), y=torch.zeros(2))),
                dict(one, state_dict=dict(x=torch.ones(2), y=torch.zeros(2, dtype=torch.int32)))]
    assert len({checksum(v) for v in [one, *variants]}) == len(variants) + 1


def test_newer_format(tmp_path):
    checkpoint = torch.load(write(tmp_path), weights_only=True)
    torch.save(dict(checkpoint, format_version=FORMAT_VERSION + 1), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='newer'):
        read_checkpoint(tmp_path / 'x.pth')
    torch.save(dict(checkpoint, format_version='evil'), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='format_version'):
        read_checkpoint(tmp_path / 'x.pth')


# ---- foreign and hostile --------------------------------------------------------------------------------------------
def test_foreign_checkpoints(tmp_path):
    torch.save(OrderedDict(STATE), tmp_path / 'plain.pth')
    assert set(read_checkpoint(tmp_path / 'plain.pth')) == set(STATE)
    official = dict(base_model=STATE, epoch=3, args=argparse.Namespace(lr=0.1, name='x'),
                    metrics=dict(acc=np.float64(93.2), n=np.int64(3)), curve=np.arange(3.0))
    torch.save(official, tmp_path / 'official.pth')
    back = read_checkpoint(tmp_path / 'official.pth')
    assert back['args'].lr == 0.1 and float(back['metrics']['acc']) == 93.2 and back['curve'].tolist() == [0, 1, 2]
    torch.save(STATE, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / 'legacy.pth')['a.weight'], STATE['a.weight'])
    torch.save(torch.ones(2), tmp_path / 'tensor.pth')
    with pytest.raises(ValueError, match='a dict was expected'):
        read_checkpoint(tmp_path / 'tensor.pth')


class Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize('legacy', [False, True])
def test_hostile_pickles_run_nothing(tmp_path, legacy):
    marker = tmp_path / 'marker'
    for function, args in ((os.system, (f'touch {marker}',)), (exec, (f'open({str(marker)!r}, "w")',)),
                           (open, (str(marker), 'w')), (__import__, ('os',))):
        content = dict(state_dict=STATE, meta=Evil(function, *args))
        torch.save(content, tmp_path / 'evil.pth', _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r'evil\.pth was refused: .*asks for .*Nothing in it was run'):
            read_checkpoint(tmp_path / 'evil.pth')
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(Evil(os.system, f'touch {marker}')))
    with pytest.raises(ValueError, match='evil'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not marker.exists()


def test_a_hostile_entry_in_one_of_our_files(tmp_path):
    """The pickle inside the zip is replaced; the tensors stay."""
    path, marker = write(tmp_path), tmp_path / 'marker'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / 'evil.pth', 'w') as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith('data.pkl'):
                data = pickle.dumps(dict(state_dict=Evil(os.system, f'touch {marker}')), protocol=2)
            target.writestr(item.filename, data)
    with pytest.raises(ValueError, match='refused'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not marker.exists()


def test_the_allow_list_is_not_left_open(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    write(tmp_path)
    read_checkpoint(tmp_path / 'x.pth')
    assert set(torch.serialization.get_safe_globals()) == before


def test_the_refusal_gives_no_dangerous_advice(tmp_path):
    """torch's own messages recommend to read such a file without protection."""
    path = tmp_path / 'x.pth'
    contents = [pickle.dumps(Evil(print)), pickle.dumps(dict(a=1), protocol=5), b'\x80\x02\x95junk', b'junk']
    zipped = write(tmp_path, 'y.pth').read_bytes()
    for content in [*contents, zipped.replace(b'ctorch._utils', b'ctorch._utilz')]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r'x\.pth') as caught:
            read_checkpoint(path)
        assert 'weights_only' not in str(caught.value) and '\n' not in str(caught.value)
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    with pytest.raises(ValueError, match=r'x\.pth') as caught:
        read_checkpoint(path)
    assert 'weights_only' not in str(caught.value)


def test_flipped_bytes_in_a_legacy_file(tmp_path):
    """The old format has no checksum of any kind: whatever the reader stumbles over is a ValueError."""
    torch.save(STATE, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    whole = (tmp_path / 'x.pth').read_bytes()
    for position in range(0, len(whole), 3):
        content = bytearray(whole)
        content[position] ^= 0xA5
        (tmp_path / 'x.pth').write_bytes(content)
        with contextlib.suppress(ValueError):  # or it is read: a flipped weight cannot be told from another weight
            read_checkpoint(tmp_path / 'x.pth')


@pytest.mark.parametrize(('change', 'message'), [
    (dict(state_dict=[1]), 'state_dict is a list; a dict was expected'),
    (dict(state_dict={'a': 'text'}), r"state_dict\['a'\] is a str; a tensor was expected"),
    (dict(state_dict={1: torch.ones(1)}), r'state_dict has the key 1; names'),
    (dict(ema_state_dict={'a': None}), r"ema_state_dict\['a'\] is a NoneType; a tensor"),
    (dict(meta=[1]), 'meta is a list; a dict was expected'),
    (dict(meta=dict(dataset_meta=[1])), r'meta\.dataset_meta is a list; a dict'),
    (dict(meta=dict(dataset_meta=dict(classes=3))), r'meta\.dataset_meta\.classes is a int; a list'),
    (dict(meta=dict(seed='x')), r'meta\.seed is a str; an integer'),
    (dict(optimizer=[1]), 'optimizer is a list; a dict'),
    (dict(rng=3), 'rng is a int; a list'),
    ({7: 1}, 'the file has the key 7; names'),
    (dict(more=torch.eye(2).to_sparse()), 'holds what no checkpoint of ewa3d does'),
])
def test_entries_of_another_type_are_named(tmp_path, change, message):
    """Files with our version and a right checksum, which anybody can compute."""
    content = {**dict(format_version=1, meta={}, state_dict=dict(STATE)), **change}
    with contextlib.suppress(Exception):
        content['checksum'] = checksum(content)
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=rf'x\.pth:? .*{message}'):
        read_checkpoint(tmp_path / 'x.pth')


def test_a_list_that_holds_itself(tmp_path):
    endless = []
    endless.append(endless)
    torch.save(dict(format_version=1, meta={}, state_dict={}, more=endless), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='holds what no checkpoint of ewa3d does'):
        read_checkpoint(tmp_path / 'x.pth')


def test_foreign_entries_of_another_type(tmp_path):
    for content, message in (({1: torch.ones(1)}, 'the file has the key 1'), (dict(meta=[1]), 'meta is a list'),
                             (dict(state_dict=[1]), 'state_dict is a list'),
                             (dict(state_dict={(1, 2): torch.ones(1)}), r'state_dict has the key \(1, 2\)')):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(ValueError, match=rf'x\.pth: {message}'):
            read_checkpoint(tmp_path / 'x.pth')
    torch.save(dict(state_dict=dict(STATE, note='by hand'), optimizer=None, rng='abc'), tmp_path / 'x.pth')
    assert read_checkpoint(tmp_path / 'x.pth')['rng'] == 'abc'  # nothing here reads it
    with pytest.raises(ValueError, match="'note' is a str; a tensor was expected"):
        load_model_state(nn.Linear(1, 1), read_checkpoint(tmp_path / 'x.pth')['state_dict'])


# ---- use ------------------------------------------------------------------------------------------------------------
def test_find_last_checkpoint(tmp_path):
    assert find_last_checkpoint(tmp_path) is None
    (tmp_path / 'last_checkpoint').write_text('/somewhere/else/epoch_3.pth')
    with pytest.raises(FileNotFoundError, match='epoch_3'):
        find_last_checkpoint(tmp_path)
    (tmp_path / 'epoch_3.pth').write_bytes(b'x')
    assert find_last_checkpoint(tmp_path) == tmp_path / 'epoch_3.pth'


def test_select_weights():
    raw, averaged = torch.zeros(2), torch.ones(2)
    both = dict(state_dict=dict(w=averaged), ema_state_dict={'module.w': raw, 'steps': torch.tensor(3)}, meta={})
    assert select_weights(both)[1] == 'ema' and select_weights(both)[0]['w'] is averaged
    assert select_weights(both, 'raw') == (dict(w=raw), 'raw')
    fused = dict(state_dict=dict(w=averaged), meta=dict(weights='ema'))
    assert select_weights(fused, 'ema')[1] == 'ema'
    with pytest.raises(ValueError, match='ema weights only'):
        select_weights(fused, 'raw')
    with pytest.raises(ValueError, match='raw weights only'):
        select_weights(dict(state_dict=dict(w=raw)), 'ema')
    with pytest.raises(ValueError, match='both'):
        select_weights(both, 'both')


def test_load_model_state_says_what_is_wrong():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    good = {k: torch.randn_like(v) for k, v in before.items()}
    cases = {
        r'fuse it with tools/fuse\.py': {**good, '0.weight': torch.zeros(2, 4, 3), '0.bias': torch.zeros(2, 4)},
        '7 in the checkpoint, 5 in the model': {**good, '2.weight': torch.zeros(7, 4), '2.bias': torch.zeros(7)},
        'of another model': {'x.weight': torch.zeros(1), 'y': torch.zeros(2)},
        '1 missing': {k: v for k, v in good.items() if k != '0.bias'},
        '1 unexpected': {**good, 'extra': torch.zeros(1)},
    }
    for text, state in cases.items():
        with pytest.raises(ValueError, match=rf'file\.pth does not fit.*{text}'):
            load_model_state(model, state, 'file.pth')
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), text
    load_model_state(model, {f'module.{k}': v for k, v in good.items()})
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())


def task_model(num_experts=0, embed_dim=16, num_classes=3, hidden=16):
    cfg = dict(type='TaskModel', neck=dict(type='TokenPool'),
               head=dict(type='ClsHead', num_classes=num_classes, hidden=hidden),
               backbone=dict(type='TokenEncoder', embed_dim=embed_dim, depth=2, num_heads=2,
                             tokenizer=dict(type='PointPatchEmbed', num_groups=4, group_size=4, embed_dim=embed_dim)))
    model = MODELS.build(cfg)
    if num_experts:
        expand(model, dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=num_experts))
    return model


def test_the_likely_cause_is_the_right_one():
    def error(model, other) -> str:
        with pytest.raises(ValueError) as caught:
            load_model_state(model, other if isinstance(other, dict) else other.state_dict(), 'f.pth')
        return str(caught.value)

    classes = 'The number of classes differs'
    text = error(task_model(num_experts=4), task_model(num_experts=3))
    assert 'E=3 experts, the model E=4: set num_experts=3' in text and classes not in text
    assert 'fuse it with tools/fuse.py' in error(task_model(), task_model(num_experts=2))
    assert f'{classes}: 5 in the checkpoint, 3 in the model' in error(task_model(), task_model(num_classes=5))
    assert f'{classes}: 5 in' in error(task_model(num_experts=2), task_model(num_experts=2, num_classes=5))
    wider = task_model().state_dict()
    wider['backbone.blocks.0.mlp.fc1.weight'] = torch.zeros(77, 16)
    for text in (error(task_model(), wider), error(task_model(), task_model(embed_dim=32)),
                 error(task_model(), task_model(hidden=32)),
                 error(task_model(num_experts=3), task_model(num_experts=2, num_classes=5))):
        assert 'another config' in text or 'another model' in text
        assert classes not in text and 'experts,' not in text


def test_the_reason_of_a_truncated_file_is_whole(tmp_path):
    whole = write_checkpoint(tmp_path / 'whole.pth', dict(a=torch.ones(5000))).read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r'\(\w+: PytorchStreamReader failed [^.]*\)$'):
        read_checkpoint(tmp_path / 'cut.pth')
