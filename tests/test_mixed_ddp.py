"""Two ranks on batches of images and clouds: the same source at the same time, and weights that stay in step."""
import torch
from engine_toys import same, write_config
from mixed_toys import mixed_config
from test_ddp import RANK, two_ranks

from ewa3d.engine.checkpoint import read_checkpoint


def test_ranks_stay_in_step_and_resume_exactly(tmp_path):
    cfg = mixed_config(tmp_path / 'run', weights=dict(clouds=1, images=1), epochs=2)
    config = write_config(tmp_path / 'config.py', cfg)
    config.write_text(config.read_text().replace("'engine_toys'", "'mixed_toys'"))
    two_ranks('-c', RANK, str(config))
    runs = [[torch.load(tmp_path / name / f'rank{i}.pt', weights_only=True) for i in range(2)]
            for name in ('run', 'run_resumed')]
    one, other = runs[0]
    assert same(one['state'], other['state'])  # experts, both tokenizers and both heads, bit for bit
    assert one['metrics'] == other['metrics'] and {'clouds/OA', 'images/OA'} <= set(one['metrics'])
    for whole, resumed in zip(*runs):
        assert same(whole['state'], resumed['state']) and same(whole['rng'], resumed['rng'])
    before = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')['state_dict']
    moved = {key for key, value in before.items() if not torch.equal(value, one['state'][key])}
    for part in ('backbone.tokenizer.points', 'backbone.tokenizer.img', 'tasks.clouds.head', 'tasks.images.head',
                 'backbone.blocks.0.mlp'):
        assert any(key.startswith(part) for key in moved), part
