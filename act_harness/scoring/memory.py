"""How much of our scoring fits into the memory that stock scoring takes at the same batch size.

Estimates from a model's configuration, in values rather than bytes, for batch sizes given as a
number of sequences; for ``auto`` the tokens that fit on a GPU, measured. What runs out of memory
nevertheless is halved by the scorer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from act_harness.attention.dimensions import cached_values, widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["answers_per_sequence", "fitting_tokens", "packed_tokens_per_token"]


def answers_per_sequence(model: PreTrainedModel) -> float:
    """How many repeated caches cost what stock scoring pays in logits for one sequence.

    lm-eval's ``hf`` holds logits and log-probabilities of every position, ``2 x vocabulary``
    values a token; a cache repeated for an answer holds ``2 x layers x key heads x head size``. So
    many answers for each sequence of a batch stay within stock's peak memory. At least 1.
    """
    config = model.config.get_text_config()
    return max(1.0, float(2 * config.vocab_size / max(1, cached_values(config))))


def packed_tokens_per_token(model: PreTrainedModel) -> float:
    """How many packed tokens take the memory that stock scoring takes for one token. At least 1.

    A rough count. Stock: activations (six hidden vectors and three of the feed-forward block), and
    logits and log-probabilities over the vocabulary. Packed: the activations, and 30 % on top for
    the copies that attention makes. At most 4, beyond which little is won.
    """
    config = model.config.get_text_config()
    own = float(6 * config.hidden_size + 3 * max(widths(config)))
    ratio: float = (own + 2 * config.vocab_size) / (1.3 * own)
    return max(1.0, min(4.0, ratio))


def fitting_tokens(model: Any, device: torch.device, longest: int) -> int:  # noqa: ANN401
    """Estimate how many tokens of a forward fit on a GPU, from the peak of a small one."""
    rows, columns = 4, min(longest, 512)
    ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
    with torch.no_grad():
        for _ in range(2):  # the first pass pays for handles and workspaces
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            each = (torch.cuda.max_memory_allocated(device) - before) / ids.numel()
    free = torch.cuda.mem_get_info(device)[0]
    return int(min(max(0.5 * free / max(each, 1.0), longest), 1 << 18))
