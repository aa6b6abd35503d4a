"""A sample's loss and where its gradient begins: the output of the last decoder block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from bitmosaic.model.stub import Stub

# Logits of a chunk of tokens. The loss holds about four tensors of this size at once: 64 MiB keep
# a vocabulary of 256 000 below 300 MB, where all logits of 2048 tokens would take 8 GB.
LOGIT_BYTES = 64 * 2**20


def loss_gradient(
    rest: PreTrainedModel, last: Stub, window: Tensor, hidden: Tensor, teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a sample's loss and its gradient at the output of the last block.

    What follows the blocks treats each token by itself, so it runs on a chunk of tokens at a time:
    the last stub returns the chunk's hidden states in the place of its own.
    """
    predictions = len(window) - 1
    wide = torch.promote_types(hidden.dtype, torch.float32)
    vocabulary = rest.config.get_text_config().vocab_size
    step = max(1, LOGIT_BYTES // (vocabulary * wide.itemsize))
    gradient = torch.zeros_like(hidden)  # the last token predicts nothing
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, predictions, step):
        stop = min(start + step, predictions)
        targets = window[start + 1 : stop + 1]
        if teacher is not None:
            last.replacement = teacher[:, start:stop]
            with torch.no_grad():
                logits = rest(input_ids=window[None, start:stop], use_cache=False).logits
            wanted = logits[0].to(wide).log_softmax(-1)
        chunk = hidden[:, start:stop].clone().requires_grad_()
        last.replacement = chunk
        with torch.enable_grad():
            logits = rest(input_ids=window[None, start:stop], use_cache=False).logits[0].to(wide)
            if teacher is None:
                loss = functional.cross_entropy(logits, targets, reduction="sum")
            else:
                found = logits.log_softmax(-1)
                loss = functional.kl_div(found, wanted, reduction="sum", log_target=True)
            loss = loss / predictions
            loss.backward()
        assert chunk.grad is not None
        gradient[:, start:stop] = chunk.grad
        total += loss.detach()
    last.replacement = None
    return total, gradient
