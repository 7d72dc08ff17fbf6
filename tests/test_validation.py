import pytest
import torch
from torch import nn

from urank.search.validation import evaluate


def test_evaluate_returns_the_percentage_of_correct_images():
    logits = torch.eye(3)[[0, 1, 2, 0, 1, 2, 0]]
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 1])  # the last two are wrong
    for size in (1, 3, 7):
        assert evaluate(nn.Identity(), zip(logits.split(size), labels.split(size))) == pytest.approx(100 * 5 / 7)


def test_evaluate_uses_evaluation_mode_and_restores_the_mode():
    class OnlyRightInEvaluation(nn.Module):
        def forward(self, images):
            assert not torch.is_grad_enabled()
            return -images if self.training else images

    network = OnlyRightInEvaluation().train()
    assert evaluate(network, [(torch.eye(4), torch.arange(4))]) == 100
    assert network.training


def test_evaluate_refuses_no_images():
    with pytest.raises(ValueError, match="empty"):
        evaluate(nn.Identity(), [])
