import torch

from lowvram.objectives import hinge


def test_hinge_losses() -> None:
    logits = torch.tensor([[-2.0, 0.5], [1.5, 3.0]]).reshape(2, 1, 1, 2).requires_grad_()
    assert hinge.generator_loss(logits).tolist() == [0.75, -2.25]
    assert hinge.discriminator_fake_loss(logits).tolist() == [0.75, 3.25]
    assert hinge.discriminator_real_loss(logits).tolist() == [1.75, 0.0]
    hinge.discriminator_real_loss(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [-0.5, -0.5, 0, 0]  # beyond the margin nothing pulls
