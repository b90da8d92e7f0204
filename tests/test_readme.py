"""The loop for outsiders in the README runs as it stands."""
import re
from pathlib import Path

import timm
import torch

README = Path(__file__).resolve().parents[1] / 'README.md'


def test_five_lines_for_a_timm_model(tmp_path, monkeypatch):
    blocks = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)
    code = next(block for block in blocks if "timm.create_model('vit_small_patch16_224'" in block)
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
