"""Under bf16 autocast every loss term is a float32 number, and close to that of a float32 run."""

from functools import partial

import pytest
import torch
from test_no_sync import made, methods

# Nothing moves, so that all steps of both runs start from the same weights.
AT_REST = partial(torch.optim.SGD, lr=0.0)


@pytest.mark.parametrize("method", methods())
def test_terms_are_float32_and_hardly_change(method, trainer, blobs, tiny):
    def terms(precision):
        module, seen = made(method, tiny, optimizer=AT_REST), []
        combine = module.combine
        module.combine = lambda terms: seen.append({name: x.detach() for name, x in terms.items()}) or combine(terms)
        trainer(max_steps=2, precision=precision).fit(module, datamodule=blobs)
        return seen

    expected, found = terms("32-true"), terms("bf16-mixed")
    assert found
    for own, others in zip(found, expected, strict=True):
        assert {value.dtype for value in own.values()} == {torch.float32}
        assert own == pytest.approx({name: float(value) for name, value in others.items()}, rel=0.02)
