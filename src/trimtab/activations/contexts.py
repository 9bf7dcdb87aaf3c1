"""Where features fire: the tokens of texts at which each is strongest, with what stands around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trimtab.activations.packing import check_rows, tokenise
from trimtab.activations.text import Document, as_documents
from trimtab.dictionaries import Dictionary
from trimtab.dictionaries.base import check_is_dictionary
from trimtab.errors import UserError
from trimtab.lm import LanguageModel, Site, TokenBatch, capture
from trimtab.lm.model import check_is_model
from trimtab.runs import Meter, whole_numbers
from trimtab.runs.results import Result
from trimtab.runs.tables import NUMBER, Column, Table


class Context(NamedTuple):
    """A place at which a feature fires."""

    feature: int
    activation: float
    """f·‖W_dec‖: how far the feature moves the reconstruction there."""
    before: str
    token: str
    after: str
    document: str
    """Id of the document; of texts in memory their places."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureContexts(Result):
    """The strongest contexts of some features, strongest first, features in the order given."""

    features: tuple[int, ...]
    n_tokens: int
    """Tokens looked at."""
    contexts: tuple[Context, ...]

    def __getitem__(self, feature: int) -> tuple[Context, ...]:
        return tuple(context for context in self.contexts if context.feature == feature)

    def headline(self) -> str:
        named = ", ".join(map(str, self.features[:10])) + ", …" * (len(self.features) > 10)
        return f"top contexts of feature {named} among {self.n_tokens:,} tokens"

    def tables(self) -> dict[str, Table]:
        columns = [
            Column("feature", "feature", "d"),
            Column("activation", "activation", NUMBER),
            *(Column(name, name) for name in ("before", "token", "after")),
        ]
        return {"contexts": Table(columns=columns, rows=self.contexts)}


@torch.no_grad()
def top_contexts(
    model: LanguageModel,
    dictionary: Dictionary,
    texts: Iterable[str | Document],
    features: int | Sequence[int],
    *,
    site: Site | str | None = None,
    count: int = 10,
    width: int = 8,
    context: int = 256,
    batch_size: int = 8,
) -> FeatureContexts:
    """Where in texts features are strongest, at most once in each stretch of a text.

    As in training, the first position of a stretch and special tokens don't count.

    Args:
        model: the model.
        dictionary: whose features.
        texts: long ones are read in stretches of `context` tokens.
        features: one id, or several.
        site: where the dictionary reads; by default the site that it names.
        count: contexts per feature; fewer where it fires in fewer stretches.
        width: tokens shown on either side.
        context: tokens of a stretch, the leading BOS included.
        batch_size: stretches per forward pass.

    Raises:
        UserError: there is no text, a feature does not exist, no site is known, or the dictionary does not fit there.
    """
    check_is_model(model)
    check_is_dictionary(dictionary)
    wanted = whole_numbers(features, "feature")
    if not wanted:
        raise UserError("the features", "there is none", "give at least one")
    dictionary.check_features(wanted)
    if not (name := site or dictionary.info.site):
        raise UserError("the site", "the dictionary does not name the one it reads", "give a site")
    place, ids, device = model.site(name), torch.tensor(wanted, device=model.device), model.device
    corpus = tokenise(as_documents(texts), model.tokenizer)
    check_rows(corpus, model)
    stretches: list[tuple[int, list[int]]] = []
    for document, (start, stop) in enumerate(zip(corpus.starts[:-1].tolist(), corpus.starts[1:].tolist(), strict=True)):
        tokens = corpus.tokens[start : stop - 1].tolist()  # without the separator
        step = context - 1
        stretches += [(document, [corpus.first_token, *tokens[i : i + step]]) for i in range(0, len(tokens), step)]
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), device=device)
    scale = dictionary.decoder_norms.to(device)[ids]
    best = torch.zeros(3, 0, len(ids), device=device, dtype=torch.float64)  # activation, stretch, position
    with Meter("reading texts", len(stretches)) as meter:
        for first in range(0, len(stretches), batch_size):
            rows = [tokens for _, tokens in stretches[first : first + batch_size]]
            batch = TokenBatch.pad(rows, model.pad_id, device)
            x = capture(model, batch, [place])[place].flatten(2)
            dictionary.check_model(x.shape[-1], model.name, str(place))
            strength = dictionary.encode_features(x, ids) * scale * dictionary.code_unit(x)
            kept = batch.real & (batch.position_ids > 0) & ~torch.isin(batch.ids, special)
            value, time = torch.where(kept[..., None], strength, 0).max(dim=1)
            number = torch.arange(first, first + len(rows), device=device)[:, None].expand_as(time)
            found = torch.stack([value.double(), number.double(), batch.position_ids.gather(1, time).double()])
            best = torch.cat([best, found], dim=1)
            top = best[0].topk(min(count, best.shape[1]), dim=0).indices
            best = best.gather(1, top.expand(3, -1, -1))
            meter.advance(len(rows))
    contexts: list[Context] = []
    for feature, column in zip(wanted, best.unbind(2), strict=True):
        for activation, number, position in column.T.tolist():
            if activation > 0:
                document, tokens = stretches[int(number)]
                at = int(position)
                cuts = (slice(max(1, at - width), at), slice(at, at + 1), slice(at + 1, at + 1 + width))
                before, token, after = (model.decode_continuation(tokens[cut], special=True) for cut in cuts)
                contexts.append(Context(feature, activation, before, token, after, corpus.ids[document]))
    return FeatureContexts(
        features=tuple(wanted), n_tokens=sum(len(tokens) - 1 for _, tokens in stretches), contexts=tuple(contexts)
    )
