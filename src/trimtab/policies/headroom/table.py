"""The table of headroom: what each item's answer earns with each feature, and the two ways of measuring it.

Where answers are one token, every feature edits every item's last prompt token, through the item's cached prefix. Where
they are longer nothing but decoding says what an answer earns: some features are each held over the whole answer, rows
that differ only in their direction go through the one decode loop together, greedily, and every prompt is fed once.
Beside the features stand as many random directions of equal norm: with thousands of tries something flips by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from trimtab.control.setting import Setting
from trimtab.control.task_prompts import TaskPrompts, last_prompt_activations
from trimtab.dictionaries import Dictionary
from trimtab.errors import UserError
from trimtab.lm import PromptCache
from trimtab.policies.headroom.candidates import TriedFeatures
from trimtab.selection.edited_distributions import BaseDistribution, EditedDistributions
from trimtab.selection.scorer import LastTokenScorer
from trimtab.steering import DirectionTable, StaticSource, coefficients

Scheme = Literal["last prompt token", "every answer token"]
"""Where the edit is: once, before a one-token answer, or wherever a token of the answer is chosen."""
Progress = Callable[[float], None]
"""Called with the items, or the part of one, that are done."""


class HeadroomTable(NamedTuple):
    """What an edit would earn, for P items and n features tried."""

    reward: Float[np.ndarray, "P n"]
    """With each feature."""
    random: Float[np.ndarray, "P r"]
    """With each of as many random directions of equal norm."""
    unsteered: Float[np.ndarray, " P"]
    x: Float[np.ndarray, "P d"]
    """Activations at the last prompt token, before the edit."""
    strength: Float[np.ndarray, "P n"]
    """f_i(x)·‖W_dec[i]‖: how active each feature is."""
    allowed: Bool[np.ndarray, "P n"]
    """What the mask allows at the last prompt token."""
    candidates: TriedFeatures
    """The columns."""

    @property
    def scheme(self) -> Scheme:
        return "last prompt token" if self.candidates.rule == "all" else "every answer token"

    @property
    def earned(self) -> Float[np.ndarray, "P n"]:
        """With each feature where it is allowed, and without an edit where it is not."""
        return np.where(self.allowed, self.reward, self.unsteered[:, None])

    @property
    def random_counts(self) -> Int[np.ndarray, " P"]:
        """Random directions that stand against each item's allowed features: as many, unless fewer were tried."""
        return np.minimum(self.allowed.sum(1), self.random.shape[1])

    def under(self, candidates: TriedFeatures, allowed: Bool[np.ndarray, "P of"]) -> HeadroomTable:
        """The same for some of the features that were tried, and as many random directions.

        Args:
            candidates: which.
            allowed: what a mask allows, of all features of the dictionary.
        """
        column = {feature: k for k, feature in enumerate(self.candidates.features)}
        columns = [column[feature] for feature in candidates.features]
        return self._replace(
            reward=self.reward[:, columns],
            random=self.random[:, : len(columns)],
            strength=self.strength[:, columns],
            allowed=allowed[:, list(candidates.features)],
            candidates=candidates,
        )


def headroom_table(
    setting: Setting,
    prompts: TaskPrompts,
    candidates: TriedFeatures | None = None,
    *,
    randoms: int | None = None,
    x: Float[np.ndarray, "P d"] | None = None,
    progress: Progress | None = None,
) -> HeadroomTable:
    """Try features, and as many random directions, on every item; all of them are allowed.

    Args:
        setting: model, dictionary, site, dose and unit of each edit, the seed of the random directions, and how rows
            are decoded. Random directions take the features' mean length.
        prompts: items.
        candidates: the features that are tried, each held over the whole answer; all by default, for answers that are
            the next token.
        randoms: random directions to try; by default as many as candidates.
        x: activations at the items' last prompt tokens, if they are known.
        progress: told whenever some edits are done.

    Raises:
        UserError: all features are to be tried where answers are longer than a token, or the model's layers cannot be
            called one by one; statistics are missing for `max_activation`.
    """
    if candidates is None and prompts.max_new_tokens != 1:
        raise UserError(
            f"headroom of {prompts.task.name}",
            f"its answers take up to {prompts.max_new_tokens} tokens, and only the next one can be scored in one step",
            "set max_new_tokens to 1 where the first token decides, or name candidates to hold over the whole answer",
        )
    model, dictionary = setting.model, setting.needed_dictionary()
    candidates = candidates or TriedFeatures.all(dictionary.n_features)
    ids = torch.tensor(candidates.features)
    noise = random_directions(dictionary, setting.seed)[: len(ids) if randoms is None else randoms]
    cache = setting.prompt_cache or PromptCache(model)
    if x is None:
        x = last_prompt_activations(model, prompts, setting.needed_site(), cache)
    read = torch.from_numpy(x).to(model.device)
    codes = dictionary.encode(read) * dictionary.decoder_norms * dictionary.code_unit(read)
    told = progress or (lambda _: None)
    if candidates.rule == "all":
        reward = _through_the_prefix(setting, prompts, noise, told)
    else:
        reward = _by_decoding(setting, prompts, ids, noise, cache, told)
    return HeadroomTable(
        reward=reward[:, 1 : 1 + len(ids)],
        random=reward[:, 1 + len(ids) :],
        unsteered=reward[:, 0],
        x=x,
        strength=codes[:, ids.to(codes.device)].float().cpu().numpy(),
        allowed=np.ones((len(prompts), len(ids)), dtype=bool),
        candidates=candidates,
    )


def random_directions(dictionary: Dictionary, seed: int) -> Float[Tensor, "n d"]:
    """As many unit directions as the dictionary has features, uniform on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(dictionary.n_features, dictionary.d_in, generator=generator)
    return noise / noise.norm(dim=1, keepdim=True)


def _through_the_prefix(
    setting: Setting, prompts: TaskPrompts, noise: Float[Tensor, "r d"], progress: Progress
) -> Float[np.ndarray, "P 1+n+r"]:
    """Rewards without an edit, with each feature and with each random direction at the last prompt token."""
    model, table = setting.model, DirectionTable.of(setting.needed_dictionary())
    most = None if table.max_activation is None else table.max_activation[:, None]
    doses = torch.full((table.n, 1), setting.dose)
    found: list[NDArray[np.float32]] = []
    for i, ids in enumerate(prompts.ids):
        scorer = LastTokenScorer(model, setting.needed_site(), ids)
        length = coefficients(setting.unit, doses, scorer.continuation.x.expand(table.n, -1), most)[:, 0]
        options = None if prompts.allowed is None else torch.tensor(sorted(prompts.allowed[i]), device=model.device)
        greedy = partial(_greedy, options)
        parts = [greedy(scorer.base)]
        for rows, c in ((table.rows, length), (noise, length.abs().mean().expand(len(noise)))):
            tried = scorer.score(
                rows, c, {"token": greedy}, progress=lambda edits: progress(edits / (table.n + len(noise)))
            )
            parts.append(tried["token"])
        unique, place = np.unique(torch.cat(parts).cpu().numpy(), return_inverse=True)
        texts = [model.decode_continuation([int(token)]) for token in unique]
        outcomes = prompts.task.score([prompts.items[i]] * len(texts), texts, prompts.permutation)
        found.append(np.array([outcome.reward for outcome in outcomes], dtype=np.float32)[place])
    return np.stack(found)


def _greedy(options: Tensor | None, after: EditedDistributions | BaseDistribution) -> Int[Tensor, " R"]:
    """The tokens that greedy decoding would choose, among the options if there are some."""
    logits = torch.atleast_2d(after.logits)
    return logits.argmax(-1) if options is None else options[logits[:, options].argmax(-1)]


def _by_decoding(
    setting: Setting,
    prompts: TaskPrompts,
    ids: Int[Tensor, " m"],
    noise: Float[Tensor, "r d"],
    cache: PromptCache,
    progress: Progress,
) -> Float[np.ndarray, "P 1+m+r"]:
    """Rewards without an edit, with each candidate and with each random direction held over the whole answer."""
    model, known = setting.model, DirectionTable.of(setting.needed_dictionary())
    most = None
    if known.max_activation is not None:
        own = known.max_activation[ids]
        most = torch.cat([own, own.mean().expand(len(noise))])
    rows = torch.cat([known.rows[ids.to(known.rows.device)], noise.to(known.rows.device, known.rows.dtype)])
    table = DirectionTable(rows, max_activation=most)
    dose = torch.full((1 + len(rows),), abs(setting.dose))
    dose[: 1 + len(ids)] = setting.dose
    feature = torch.arange(-1, len(rows))  # each direction is a slot of every item, after one without an edit
    reward = np.zeros(len(prompts) * len(feature), dtype=np.float32)
    for start in range(0, len(reward), setting.batch_size):
        row = torch.arange(start, min(start + setting.batch_size, len(reward)))
        slot = row % len(feature)
        source = StaticSource(
            table, feature[slot][:, None], dose[slot][:, None], setting.needed_site(), unit=setting.unit
        )
        few = prompts.take((row // len(feature)).tolist())
        decoded = few.decode(model, source, seed=setting.seed, batch_size=setting.batch_size, prompt_cache=cache)
        reward[row.numpy()] = [outcome.reward for outcome in few.outcomes(decoded)]
        progress(len(row) / len(feature))
    return reward.reshape(len(prompts), len(feature))
