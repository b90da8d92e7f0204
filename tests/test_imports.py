"""What is optional is not needed: the package, and the core on a model of one's own, with torch and mmengine alone."""
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
OPTIONAL = ('timm', 'torchvision', 'open3d', 'pytorch3d', 'matplotlib', 'h5py', 'scipy', 'numba', 'sklearn',
            'safetensors', 'onnx', 'onnxscript', 'onnxruntime')
ABSENT = f"""
import sys

class Without:  # finders as on a machine that lacks these packages
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split('.')[0] in {OPTIONAL} else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x):
        for ffn in self.ffn:
            x = x + ffn(x)
        return x

model = Net()
"""


def run(code: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    done = subprocess.run([sys.executable, '-c', ABSENT + code], cwd=REPO, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    run("import ewa3d\nassert ewa3d.__version__\nassert 'torch' not in sys.modules and 'mmengine' not in sys.modules")


def test_expand_train_and_fuse_without_optional_packages():
    run(MODEL + """
import ewa3d
ewa3d.expand(model, dict(type='EWAFFN', at='ffn.*', num_experts=3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with ewa3d.attach_ewa(optimizer, model, total_steps=3):
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 6)).square().mean().backward()
        optimizer.step()
x = torch.randn(2, 5, 6)
before = model.eval()(x)
ewa3d.fuse(model)
torch.testing.assert_close(model(x), before)
""")


def test_a_point_model_without_optional_packages():
    run("""
import ewa3d, torch
import ewa3d.layers, ewa3d.models, ewa3d.datasets, ewa3d.engine, ewa3d.evaluation
from ewa3d import ops
model = ewa3d.build(dict(type='TaskModel', backbone=dict(type='TokenEncoder', embed_dim=12, depth=1, num_heads=2,
    tokenizer=dict(type='PointPatchEmbed', num_groups=4, group_size=4)), neck=dict(type='TokenPool'),
    head=dict(type='ClsHead', num_classes=3)))
assert model(dict(points=torch.randn(2, 20, 3))).shape == (2, 3)
points = torch.randn(1, 2100, 3)
assert ops.knn(points, points, 3)[1][0, :, 0].tolist() == list(range(2100))
""")
