"""What tests of token losses start from."""

import pytest
import torch
from tiny_logits import N, V


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(N, V, dtype=torch.float64, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()
