"""Teacher-mixed sampling: each token is drawn from a mixture of the student's and the teacher's distributions."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_distill.core.errors import UsageError, check_least
from lit_distill.llm.batch import TokenBatch
from lit_distill.llm.network import CausalLM, pad_left
from lit_distill.llm.policy import log_mixture
from lit_distill.llm.reading import Reader, check_reading
from lit_distill.llm.rollouts import Rollout, prompts_of, with_completions

if TYPE_CHECKING:
    from lit_distill.llm.distillation import TokenDistiller


class TeacherMixed(Rollout):
    r"""Student and teacher write together: :math:`y_t \sim \alpha \, p_t + (1 - \alpha) \, q_t`.

    The teacher keeps the text from degenerating while the student cannot write yet. Rows of the batch must hold one
    document each: what stands before the first scored token is the prompt.

    Args:
        share: alpha from 0, the student alone, to below 1.
        max_new_tokens: Longest completion.

    Reference: Gu et al., MiniLLM, 2023, arXiv 2306.08543.
    """

    def __init__(self, share: float = 0.2, max_new_tokens: int = 128) -> None:
        if not 0 <= share < 1:
            raise UsageError(f"rollout.share is {share}; give the teacher's share, from 0 to below 1 (published: 0.2)")
        check_least("rollout", 1, max_new_tokens=max_new_tokens)
        self.share = share
        self.max_new_tokens = max_new_tokens

    def __call__(self, batch: TokenBatch, module: "TokenDistiller") -> TokenBatch:
        """Lets both write.

        Raises:
            UsageError: There is no teacher that runs, or its weights are sharded.
        """
        prompts = pad_left(prompts_of(batch))
        mixture = _Mixture(None, prompts[1].to(module.device), 0.0, module.vocab_size)
        if self.share:
            if module.teacher is None:
                raise UsageError("model.teacher is missing; with rollout.share it writes too, give one")
            if isinstance(module.student, FSDPModule):
                raise UsageError(
                    "rollout.share: both networks write on whole weights only; train with --trainer.strategy ddp, or "
                    "give 0"
                )
            check_reading(module.teacher, prompts[0].shape[1] + self.max_new_tokens)
            mixture = _Mixture(module.teacher, mixture.valid, self.share, module.vocab_size)
        tokens, mask = module.student.generate(prompts, max_new_tokens=self.max_new_tokens, adjust=mixture)
        return with_completions(batch, tokens, mask, module)


class _Mixture:
    """Makes logits of the mixture out of the student's, while the teacher reads along."""

    def __init__(self, teacher: CausalLM | None, valid: Bool[Tensor, "b p"], share: float, vocab_size: int) -> None:
        self.reader = None if teacher is None else Reader(teacher)
        self.valid = valid
        self.share = share
        self.vocab_size = vocab_size
        self.read = 0

    def __call__(self, tokens: Int[Tensor, "b l"], logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        own = logits[:, : self.vocab_size].float()  # tokens that one of them lacks are never written
        if self.reader is not None:
            visible = F.pad(self.valid, (0, tokens.shape[1] - self.valid.shape[1]), value=True)
            said = self.reader.read(tokens[:, self.read :], visible, keep=1)[:, -1, : self.vocab_size].float()
            self.read = tokens.shape[1]
            own = log_mixture(own.log_softmax(-1), said.log_softmax(-1), self.share)
        return F.pad(own, (0, logits.shape[1] - self.vocab_size), value=-torch.inf)
