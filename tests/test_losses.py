"""The losses against an independent library, and gradients where numbers get small."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer

from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import SelfConNet
from imaginet_nb.training.grad_cache import cached_step
from imaginet_nb.training.losses import ImagiNetLoss, SelfConLoss, loss_bounds


def random_batch(seed: int):
    "Embeddings of unit length, origin and family, in a batch whose shape also depends on the seed."
    draw = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))
    B, V, D = pick(2, 24), pick(1, 4), pick(2, 64)
    z = F.normalize(torch.randn(B, V, D, generator=draw, dtype=torch.float64), dim=-1)
    origin, family = torch.randint(0, 2, (B,), generator=draw), torch.randint(0, 4, (B,), generator=draw)
    return z, origin, family


def by_library(z, labels, temperature):
    """pytorch-metric-learning's supervised contrastive loss on the flattened exits.

    Its default reducer averages over anchors with a non-zero loss, which are those with a positive unless a loss is
    exactly zero; so the mean over anchors that have a positive is taken here from its per-anchor losses. It gives up
    (zero) where no anchor has a negative, so such batches are left to the other tests.
    """
    flat, y = z.flatten(0, 1), labels.repeat_interleave(z.shape[1])
    mean = SupConLoss(temperature, reducer=MeanReducer())(flat, y)
    has_positive = (y[:, None] == y[None, :]).sum(1) > 1
    return mean * len(y) / has_positive.sum()


def comparable(z, labels) -> bool:
    "The library needs anchors with a positive, and anchors with a negative."
    return len(labels.unique()) > 1 and (z.shape[1] > 1 or len(labels) > len(labels.unique()))


ONE_LABEL = [s for s in range(25) if comparable(*random_batch(s)[:2])]
TWO_LABELS = [s for s in range(50) for z, o, f in [random_batch(s)] if comparable(z, o) and comparable(z[o == 1], f[o == 1])]


def test_there_are_enough_comparable_batches():
    assert len(ONE_LABEL) > 15 and len(TWO_LABELS) > 15
    assert {random_batch(s)[0].shape[1] for s in ONE_LABEL} == {1, 2, 3}


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("seed", ONE_LABEL)
def test_selfcon_equals_pytorch_metric_learning(seed, temperature):
    z, labels, _ = random_batch(seed)
    torch.testing.assert_close(SelfConLoss(temperature)(z, labels), by_library(z, labels, temperature), rtol=1e-6, atol=1e-9)


def test_its_default_reducer_agrees_with_two_exits():
    z, labels, _ = random_batch(3)
    z = F.normalize(torch.cat([z[:, :1], z[:, :1] + 0.3 * z.roll(1, 0)[:, :1]], dim=1), dim=-1)
    expected = SupConLoss(0.07, reducer=AvgNonZeroReducer())(z.flatten(0, 1), labels.repeat_interleave(2))
    torch.testing.assert_close(SelfConLoss(0.07)(z, labels), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("seed", TWO_LABELS)
def test_two_label_loss_is_the_sum_of_two_library_losses(seed, temperature):
    z, origin, family = random_batch(seed)
    synthetic = origin == 1
    expected = by_library(z, origin, temperature) + by_library(z[synthetic], family[synthetic], temperature)
    torch.testing.assert_close(ImagiNetLoss(temperature)(z, origin, family), expected, rtol=1e-6, atol=1e-9)


def test_real_images_are_no_negatives_of_the_family_term():
    "A wrong program that keeps real images in the denominator of the family term would notice them move."
    z = F.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=-1)
    origin, family = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 4])
    term = lambda z: ImagiNetLoss()(z, origin, family) - SelfConLoss()(z, origin)
    moved = torch.cat([z[:2], -z[2:]])
    torch.testing.assert_close(term(z), term(moved), rtol=1e-9, atol=1e-12)


def test_gradient_by_finite_differences():
    z, origin, family = random_batch(7)
    x = (2 * z).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ImagiNetLoss(0.3)(F.normalize(x, dim=-1), origin, family), x)


@pytest.mark.parametrize("seed", ONE_LABEL)
def test_bounds_by_the_library(seed):
    "Equal embeddings give the upper bound; one direction per class, at right angles, gives the lower one at a low temperature."
    z, labels, _ = random_batch(seed)
    clustered, equal = loss_bounds(labels, z.shape[1])
    ones = F.normalize(torch.ones_like(z), dim=-1)
    assert by_library(ones, labels, 0.07).item() == pytest.approx(equal, abs=1e-9)
    one_direction = torch.eye(2, dtype=z.dtype)[labels][:, None].expand(-1, z.shape[1], -1)
    assert by_library(one_direction, labels, 0.01).item() == pytest.approx(clustered, abs=1e-9)
    assert clustered <= SelfConLoss(0.07)(z, labels).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("labels_on", ["cpu", "cuda"])
def test_no_training_step_waits_for_the_gpu(labels_on):
    z, origin, family = (x.cuda() for x in random_batch(7))
    origin, family = origin.to(labels_on), family.to(labels_on)
    if labels_on == "cpu": origin, family = origin.pin_memory(), family.pin_memory() # as the loader does
    expected = ImagiNetLoss()(z.cpu(), origin.cpu(), family.cpu())
    ImagiNetLoss()(z.clone().requires_grad_(), origin, family).backward() # libraries load on first use
    z.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = ImagiNetLoss()(z, origin, family)
        loss.backward()
    finally: torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.detach().cpu(), expected, rtol=1e-6, atol=1e-9)


def degenerate_batches():
    z = F.normalize(torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    zeros, ones, family = torch.zeros(6).long(), torch.ones(6).long(), torch.arange(6) % 4
    mixed = torch.tensor([0, 0, 0, 0, 0, 1])
    return {
        "no synthetic image": (z, zeros, family), "synthetic only": (z, ones, family), "one synthetic image": (z, mixed, family),
        "one real image": (z[:1], zeros[:1], family[:1]), "one image, one exit": (z[:1, :1], ones[:1], family[:1]),
        "no positive at all": (z[:2, :1], torch.tensor([0, 1]), family[:2]), "one family": (z, ones, zeros),
        "all embeddings equal": (z[:1, :1].expand(6, 2, 8), torch.arange(6) % 2, family),
        "opposite embeddings": (torch.cat([z[:1, :1], -z[:1, :1]]).repeat(3, 2, 1), torch.arange(6) % 2, family),
        "empty": (z[:0], zeros[:0], family[:0])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", degenerate_batches())
def test_value_and_gradient_are_finite(case, dtype):
    z, origin, family = degenerate_batches()[case]
    z = z.to(dtype).requires_grad_()
    loss = ImagiNetLoss(0.07)(z, origin, family)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_no_overflow_at_low_temperature(temperature):
    "exp(1/0.01) is beyond float32: the soft-max must not be computed from bare exponentials."
    z, origin, family = degenerate_batches()["opposite embeddings"]
    z = z.clone().requires_grad_()
    loss = ImagiNetLoss(temperature)(z, origin, family)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_autocast_changes_nothing():
    z, origin, family = random_batch(4)
    with torch.autocast("cpu", torch.bfloat16): inside = ImagiNetLoss()(z.float(), origin, family)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.double(), ImagiNetLoss()(z, origin, family), rtol=1e-5, atol=1e-6)


def test_half_precision_is_close():
    z, origin, family = random_batch(12)
    exact = ImagiNetLoss()(z, origin, family)
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        assert ImagiNetLoss()(z.to(dtype), origin, family).item() == pytest.approx(exact.item(), rel=tolerance)


@pytest.mark.parametrize("wrong", [lambda z, o, f: (z[:, 0], o, f), lambda z, o, f: (2 * z, o, f), lambda z, o, f: (z, o[:-1], f),
                                   lambda z, o, f: (z, o, f[:, None]), lambda z, o, f: (z, o.float(), f), lambda z, o, f: (z, o + 1, f),
                                   lambda z, o, f: ((z * 9).long(), o, f)])
def test_wrong_input_is_refused(wrong):
    with pytest.raises(ValueError, match="must"): ImagiNetLoss()(*wrong(*random_batch(5)))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_cached_gradient_is_the_full_gradient(chunk_size):
    torch.manual_seed(0)
    net = SelfConNet(create_backbone("resnet18", width=0.125), projection_size=16).eval()
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    origin, family = torch.arange(7) % 2, torch.arange(7) // 2 % 4
    loss_fn = lambda z: ImagiNetLoss()(z, origin, family)
    full = loss_fn(net(images))
    full.backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    torch.testing.assert_close(cached_step(net, images, loss_fn, chunk_size), full.detach(), rtol=1e-5, atol=1e-6)
    for name, p in net.named_parameters(): torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_cached_step_leaves_frozen_batchnorm_alone_and_counts_once_otherwise():
    torch.manual_seed(0)
    net = SelfConNet(create_backbone("resnet18", width=0.125), projection_size=16).train()
    net.backbone.layer1.eval()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    for _ in range(3): cached_step(net, images, lambda z: SelfConLoss()(z, torch.arange(6) % 2), chunk_size=2)
    counts = {name: int(b) for name, b in net.named_buffers() if "tracked" in name}
    assert all(n == (0 if "layer1" in name else 3) for name, n in counts.items()), counts


def test_cached_step_under_autocast_gives_every_parameter_its_gradient():
    "In older torch a low-precision copy of a weight, made without a graph, was used again in the pass with one."
    torch.manual_seed(0)
    net = SelfConNet(create_backbone("resnet18", width=0.125), projection_size=16).eval()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    loss_fn = lambda z: SelfConLoss()(z, torch.arange(6) % 2)
    gradients = []
    for step in (lambda: loss_fn(net(images)).backward(), lambda: cached_step(net, images, loss_fn, chunk_size=2)):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): step()
        missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_cached_step_restores_the_network_after_an_error():
    net = SelfConNet(create_backbone("resnet18", width=0.125), projection_size=16).train()
    before = {name: b.clone() for name, b in net.named_buffers()}
    def fails(z): raise RuntimeError("loss failed")
    with pytest.raises(RuntimeError, match="loss failed"):
        cached_step(net, torch.zeros(4, 3, 16, 16, dtype=torch.uint8), fails, chunk_size=2)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    assert net.backbone.bn1.track_running_stats and torch.is_autocast_cache_enabled()
