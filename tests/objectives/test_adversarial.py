"""The losses against closed forms and against finite differences of their definition."""

import math

import pytest
import torch

from lowvram.objectives import adversarial


def test_logistic_losses():
    logits = torch.tensor([[-2.0], [0.0], [3.0]], dtype=torch.float64)
    sigmoid = 1 / (1 + (-logits[:, 0]).exp())
    torch.testing.assert_close(adversarial.generator_loss(logits), -sigmoid.log())
    torch.testing.assert_close(adversarial.discriminator_real_loss(logits), -sigmoid.log())
    torch.testing.assert_close(adversarial.discriminator_fake_loss(logits), -(1 - sigmoid).log())
    assert adversarial.generator_loss(logits[:, 0]).shape == (3,)


def test_the_relativistic_loss_is_that_of_the_difference():
    real, fake = torch.tensor([[-2.0], [0.0], [3.0]]).double(), torch.tensor([[1.0], [0.5], [-4.0]]).double()
    expected = -torch.sigmoid(real - fake)[:, 0].log()
    torch.testing.assert_close(adversarial.relativistic_loss(real, fake), expected)
    torch.testing.assert_close(adversarial.relativistic_loss(real[:, 0] + 5, fake[:, 0] + 5), expected)
    assert adversarial.relativistic_loss(fake, real)[0] < expected[0]  # the first image made looks real


def test_r1_of_a_linear_network_is_its_squared_weight():
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    penalty = adversarial.r1_penalty((images * weight).sum((1, 2, 3)), images)
    torch.testing.assert_close(penalty, weight.square().sum().expand(5))
    (grad,) = torch.autograd.grad(penalty.mean(), weight)
    torch.testing.assert_close(grad, 2 * weight.detach())


def test_r1_has_the_derivative_that_finite_differences_give():
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def penalty(weight):
        x = images.clone().requires_grad_()
        return adversarial.r1_penalty(torch.tanh((x * weight).sum((1, 2, 3))), x)

    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, weight)
    assert torch.autograd.gradgradcheck(penalty, weight)


@pytest.mark.parametrize("sigma", [1e-3, 0.5])
def test_r1_by_differences_is_exact_on_average_where_there_is_no_third_derivative(sigma):
    """f(x) = g x + x A x / 2, at any sigma: a one-sided difference would add (sigma / 2)^2 (2 |A|^2 + tr(A)^2)."""
    torch.manual_seed(0)
    g, a, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((12,), (12, 12), (12,)))
    a = a + a.T

    def f(x):
        return x @ g + ((x @ a) * x).sum(-1) / 2

    eps = torch.randn(400_000, 12, dtype=torch.float64)
    images = x[None].clone().requires_grad_()
    exact = adversarial.r1_penalty(f(images), images).item()
    estimates = adversarial.r1_difference_penalty(f(x + sigma * eps), f(x - sigma * eps), sigma)
    assert estimates.shape == (len(eps),)
    assert float(estimates.mean()) == pytest.approx(exact, rel=0.01)
    assert float(estimates.std()) == pytest.approx(2**0.5 * exact, rel=0.02)  # one value says little


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_r1_by_differences_of_a_linear_network_is_its_squared_change(sigma):
    weight = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    images, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)

    def network(x):
        return (x * weight).sum((1, 2, 3))[:, None]

    ahead, behind = network(images + sigma * eps), network(images - sigma * eps)
    penalty = adversarial.r1_difference_penalty(ahead, behind, sigma)
    wanted = (eps * weight).sum((1, 2, 3)).square()
    torch.testing.assert_close(penalty, wanted)
    (whole,) = torch.autograd.grad(penalty.sum(), weight, retain_graph=True)
    torch.testing.assert_close(whole, torch.autograd.grad(wanted.sum(), weight)[0])
    # One graph at a time adds up to the same.
    halves = [
        adversarial.r1_difference_penalty(ahead, behind.detach(), sigma),
        adversarial.r1_difference_penalty(ahead.detach(), behind, sigma),
    ]
    torch.testing.assert_close(sum(torch.autograd.grad(half.sum(), weight)[0] for half in halves), whole)


def test_path_length_of_a_linear_generator():
    """images = J ws: the length is |J^T y| / sqrt(H W), as a root mean over the layers."""
    torch.manual_seed(0)
    jacobian = torch.randn(3 * 4 * 4, 2 * 5, dtype=torch.float64, requires_grad=True)
    ws = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    lengths = adversarial.path_lengths((ws.flatten(1) @ jacobian.T).view(3, 3, 4, 4), ws, noise)
    products = (noise.flatten(1) @ jacobian / math.sqrt(4 * 4)).view(3, 2, 5)
    torch.testing.assert_close(lengths, products.norm(dim=2).square().mean(1).sqrt())
    (grad,) = torch.autograd.grad(adversarial.path_length_penalty(lengths, 0.3).mean(), jacobian)
    assert grad.abs().sum() > 0


def test_a_sample_never_sees_another():
    weight = torch.randn(3, 4, 4)
    images = torch.randn(4, 3, 4, 4)

    def r1(x):
        x = x.clone().requires_grad_()
        return adversarial.r1_penalty(((x * weight).sum((1, 2, 3))) ** 2, x)

    torch.testing.assert_close(r1(images), torch.cat([r1(images[:1]), r1(images[1:])]))


def test_a_missing_graph_is_named():
    images = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="images must require grad"):
        adversarial.r1_penalty(images.sum((1, 2, 3)), images)
    with pytest.raises(ValueError, match="ws must require grad"):
        adversarial.path_lengths(images, torch.randn(2, 4, 8), images)


def test_the_range_penalty_counts_what_lies_beyond_white_and_black() -> None:
    images = torch.tensor([[0.5, -1.0, 1.0, 0.0], [2.0, -3.0, 0.0, 0.0]]).reshape(2, 1, 2, 2)
    assert adversarial.range_penalty(images).tolist() == [0.0, (1 + 4) / 4]
