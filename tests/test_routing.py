"""Routes against a loop over tokens, and the losses of a router."""
import math

import pytest
import torch
from torch.func import functional_call

from ewa3d.layers.routing import (
    Choice,
    Router,
    balance_loss,
    capacity_of,
    combine,
    load_of,
    route,
    router_z_loss,
)


def choices(tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    return torch.rand(tokens, num_experts).topk(top_k, -1).indices


def naive_slots(experts: torch.Tensor, num_experts: int, capacity: int) -> list[list[int | None]]:
    """Token by token, first choices before second ones: the slot of each choice."""
    used = [0] * num_experts
    slots = [[None] * experts.shape[1] for _ in experts]
    for j in range(experts.shape[1]):
        for t, row in enumerate(experts.tolist()):
            e = row[j]
            if used[e] < capacity:
                slots[t][j] = e * capacity + used[e]
                used[e] += 1
    return slots


SIZES = [(1, 2, 1, 1), (1, 4, 4, 1), (7, 3, 2, 2), (7, 3, 2, 7), (13, 4, 1, 3), (13, 4, 4, 5), (3, 8, 2, 1),
         (0, 4, 2, 0)]


@pytest.mark.parametrize('tokens, num_experts, top_k, capacity', SIZES)
def test_routes_against_a_loop(tokens, num_experts, top_k, capacity):
    experts = choices(tokens, num_experts, top_k)
    routes = route(experts, num_experts, capacity)
    size, slots = num_experts * capacity, naive_slots(experts, num_experts, capacity)
    assert routes.slot.tolist() == [[size if s is None else s for s in row] for row in slots]
    held = {s: t * top_k + j for t, row in enumerate(slots) for j, s in enumerate(row) if s is not None}
    assert routes.item.tolist() == [held.get(s, tokens * top_k) for s in range(size)]
    assert routes.capacity == capacity
    assert routes.counts().tolist() == [sum(s // max(capacity, 1) == e for s in held) for e in range(num_experts)]


@pytest.mark.parametrize('tokens, num_experts, top_k, capacity', SIZES)
def test_dispatch_and_collect_are_gathers_with_their_gradients(tokens, num_experts, top_k, capacity):
    routes = route(choices(tokens, num_experts, top_k), num_experts, capacity)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    sent = routes.dispatch(x)
    assert sent.shape == (num_experts, capacity, 3)
    expected = torch.cat([x, x.new_zeros(1, 3)])[routes.item // top_k]
    assert torch.equal(sent.reshape(-1, 3), expected)
    weight = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((sent.reshape(-1, 3) * weight).sum(), x)
    (naive,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-14)

    y = torch.randn(num_experts, capacity, 3, dtype=torch.float64, requires_grad=True)
    rows = routes.collect(y)
    expected = torch.cat([y.reshape(-1, 3), y.new_zeros(1, 3)])[routes.slot]
    assert torch.equal(rows, expected)
    weight = torch.randn_like(expected)
    (ours,) = torch.autograd.grad((rows * weight).sum(), y)
    (naive,) = torch.autograd.grad((expected * weight).sum(), y)
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-14)


def test_capacity():
    assert capacity_of(100, 4, 1, 1.) == 25
    assert capacity_of(100, 4, 2, 1.25) == math.ceil(62.5)
    assert capacity_of(3, 8, 1, 0.1) == 1  # at least one
    assert capacity_of(10, 2, 2, 50.) == 10  # a token chooses an expert once
    assert capacity_of(0, 2, 1, 1.) == 0


@pytest.mark.parametrize('renorm', [True, False])
def test_router_chooses_the_best_by_softmax(renorm):
    router = Router(5, 4, 2, renorm).double()
    tokens = torch.randn(9, 5, dtype=torch.float64)
    choice = router(tokens)
    probs = (tokens @ router.weight.T).softmax(-1)
    order = probs.argsort(-1, descending=True)[:, :2]
    torch.testing.assert_close(choice.probs, probs)
    assert torch.equal(choice.experts, order)
    gates = probs.gather(1, order)
    torch.testing.assert_close(choice.gates, gates / gates.sum(1, keepdim=True) if renorm else gates)
    assert 'top_k=2' in repr(router)
    with pytest.raises(ValueError, match=r'width 5, got \(9, 6\)'):
        router(torch.randn(9, 6, dtype=torch.float64))


def test_router_is_float32_in_low_precision():
    router = Router(5, 4, 2)
    for tokens in (torch.randn(3, 5), torch.randn(3, 5, dtype=torch.bfloat16)):
        with torch.autocast('cpu', torch.bfloat16):
            assert router(tokens).logits.dtype == torch.float32
    router.bfloat16()
    choice = router(torch.randn(3, 5, dtype=torch.bfloat16))
    assert choice.gates.dtype == torch.float32
    assert combine(torch.randn(3, 2, 5, dtype=torch.bfloat16), choice.gates).dtype == torch.bfloat16


def test_combine_weighs_and_sums():
    rows, gates = torch.randn(4, 2, 3), torch.rand(4, 2)
    expected = torch.stack([sum(gates[t, j] * rows[t, j] for j in range(2)) for t in range(4)])
    torch.testing.assert_close(combine(rows, gates), expected)


def test_balance_loss_is_one_at_uniform_routing():
    experts = torch.arange(8).view(8, 1) % 4
    uniform = Choice(torch.zeros(8, 4), torch.full((8, 4), 0.25), experts, torch.ones(8, 1))
    assert float(balance_loss(uniform)) == pytest.approx(1)
    assert load_of(uniform).tolist() == [0.25] * 4
    first = torch.zeros(8, 1, dtype=torch.int64)
    collapsed = Choice(torch.zeros(8, 4), torch.eye(4)[first[:, 0]], first, torch.ones(8, 1))
    assert float(balance_loss(collapsed)) == pytest.approx(4)


def test_losses_against_their_formulas():
    router = Router(5, 4, 2).double()
    tokens = torch.randn(9, 5, dtype=torch.float64)

    def both(weight):
        choice = functional_call(router, {'weight': weight}, tokens)
        return balance_loss(choice), router_z_loss(choice), choice

    balance, z, choice = both(router.weight)
    shares = [sum(e == i for row in choice.experts.tolist() for e in row) / 18 for i in range(4)]
    assert float(balance) == pytest.approx(4 * sum(f * float(choice.probs[:, i].mean()) for i, f in enumerate(shares)))
    assert float(z) == pytest.approx(float(choice.logits.exp().sum(1).log().square().mean()))
    for loss in (balance, z):
        (grad,) = torch.autograd.grad(loss, router.weight, retain_graph=True)
        assert float(grad.abs().max()) > 0


def test_no_tokens_no_loss():
    choice = Router(5, 4, 2)(torch.zeros(0, 5))
    assert float(balance_loss(choice)) == 0 and float(router_z_loss(choice)) == 0
