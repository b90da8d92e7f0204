"""The three lines and the loop for outsiders in the README run as they stand."""
import re
from pathlib import Path

import numpy as np
import timm
import torch

import ewa3d
from ewa3d.engine.checkpoint import write_checkpoint

README = Path(__file__).resolve().parents[1] / 'README.md'


def block_with(text: str) -> str:
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)
    return next(block for block in blocks if text in block)


def test_three_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ewa3d.build('point-mae_xs_scratch_modelnet10-1k', num_classes=10)
    names = [f'class {i}' for i in range(10)]
    write_checkpoint('fused.pth', model.state_dict(), dict(dataset_meta=dict(classes=names)))
    np.save('chair.npy', np.random.rand(1500, 3))
    namespace: dict = {}
    exec(block_with('model.predict'), namespace)
    assert 'class ' in capsys.readouterr().out
    assert [x.ndim for x in namespace['features']] == [3, 3]


def test_five_lines_for_a_timm_model(tmp_path, monkeypatch):
    code = block_with("timm.create_model('vit_small_patch16_224'")
    assert sum('ewa3d' in line.split('#')[0] for line in code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    namespace = dict(loader=[(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))] * 2)
    exec(code, namespace)
    plain = timm.create_model('vit_small_patch16_224', num_classes=10)
    before = plain.blocks[1].mlp.fc1.weight.clone()
    plain.load_state_dict(torch.load('vit.pth', weights_only=True), strict=True)
    assert not torch.equal(plain.blocks[1].mlp.fc1.weight, before)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(plain.eval()(x), namespace['model'].eval()(x))
