"""The logit lens: which tokens a direction promotes when it is read by the final norm and the head alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.model import LanguageModel
from trimtab.lm.unembedding import Unembedding


class LensTokens(NamedTuple):
    """The most likely tokens of softmax(head(final_norm(row))), most likely first."""

    ids: Int[Tensor, "n count"]
    probs: Float[Tensor, "n count"]


@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    rows: Float[Tensor, "n d"],
    count: int = 10,
) -> LensTokens:
    """Top tokens of directions in the residual stream.

    Args:
        model: the model.
        rows: decoder rows as they are; a norm removes their length, all but its epsilon.
        count: tokens per row.

    Raises:
        UserError: the rows have another width than the residual stream, or more tokens are asked for than there are.
    """
    check_token_count(count, Unembedding(model).vocab_size)
    ids, probs = [rows.new_empty(0, count, dtype=torch.long)], [rows.new_empty(0, count, dtype=torch.float32)]
    for logits in lens_logits(model, rows):
        top = logits.topk(count, dim=-1)
        ids.append(top.indices.to(rows.device))
        probs.append((top.values - logits.logsumexp(-1, keepdim=True)).exp().to(rows.device))
    return LensTokens(torch.cat(ids), torch.cat(probs))


def lens_logits(model: LanguageModel, rows: Float[Tensor, "n d"]) -> Iterator[Float[Tensor, "R V"]]:
    """Logits head(final_norm(row)) of directions in float32, some rows at a time, valid until the next are asked for.

    Raises:
        UserError: the rows have another width than the residual stream.
    """
    if rows.shape[-1] != model.d_model:
        raise UserError(
            f"directions of width {rows.shape[-1]}",
            f"{model.name} has width {model.d_model}",
            "give rows of that width",
        )
    for block in Unembedding(model).blocks(rows.detach().to(model.device)):
        yield block.logits


def token_texts(model: LanguageModel, ids: Int[Tensor, "n count"]) -> list[list[str]]:
    """Each token as the text that it stands for, leading space included; no two look alike."""
    texts = {i: model.token_text(i) for i in set(ids.flatten().tolist())}
    return [[texts[i] for i in row] for row in ids.tolist()]


def check_token_count(count: int, vocab_size: int) -> None:
    """Raise a `UserError` unless `count` is from 1 to the vocabulary's size."""
    if not 1 <= count <= vocab_size:
        raise UserError(
            f"{count} tokens", f"there are 1 to {vocab_size} to choose from", "ask for a number in that range"
        )
