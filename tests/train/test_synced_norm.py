"""BatchNorm over all processes, in one process; tests/cli/test_processes.py has several."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from retina_fast.train.synced_norm import SyncedBatchNorm2d, synced


@pytest.fixture(autouse=True)
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_batch_norm(affine, momentum, dtype):
    torch.manual_seed(0)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    ours = SyncedBatchNorm2d(5, momentum=momentum, affine=affine).to(wide)
    torchs = nn.BatchNorm2d(5, momentum=momentum, affine=affine).to(wide)
    exact = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for training in (True, True, False):
        x = (3 * torch.randn(3, 5, 7, 2) + 1).to(dtype)
        outputs = []
        for norm in (ours.train(training), torchs.train(training)):
            norm.zero_grad()
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            assert y.dtype == dtype
            y.float().pow(3).sum().backward()
            outputs.append([y, leaf.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
        for mine, theirs in zip(*outputs, strict=True):
            error = (mine.double() - theirs.double()).abs().max()
            assert error <= exact * theirs.double().abs().max().clamp(min=1)


def test_gradients_by_finite_differences():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SyncedBatchNorm2d(3).double(), (x,))


def test_only_batch_norms_are_replaced_and_keep_their_state():
    frozen = nn.BatchNorm2d(3).requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), frozen, nn.GroupNorm(1, 3))
    before = model.state_dict()
    after = synced(model)
    kinds = [type(module).__name__ for module in after.children()]
    assert kinds[1] == ("SyncBatchNorm" if torch.cuda.is_available() else "SyncedBatchNorm2d")
    assert kinds[2] == "GroupNorm"
    assert all(torch.equal(value, before[name]) for name, value in after.state_dict().items())
    assert not any(p.requires_grad for p in after.get_submodule("1").parameters())
