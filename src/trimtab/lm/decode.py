"""The one decode loop: batched, cached, steered, forkable, replayable.

A policy, a constant feature, a log to replay: each is an `InterventionSource`, and this loop is the
only place where tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.errors import UserError
from trimtab.lm.batch import TokenBatch
from trimtab.lm.editing import DecodeStart, EditLog, InterventionSource, SourceRunner, edited
from trimtab.lm.feeding import parting_layer, prefill, step, step_copies
from trimtab.lm.model import LanguageModel
from trimtab.lm.prompt_cache import PromptCache
from trimtab.lm.restriction import AllowedTokens
from trimtab.lm.sampling import choose_token, uniform
from trimtab.lm.token_statistics import token_statistics


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    """Tokens to generate at most, per row."""
    temperature: float = 0.0
    """0 decodes greedily; otherwise logits are divided by this."""
    top_p: float = 1.0
    """Sample from the most likely tokens that hold this share of the probability."""
    stop: tuple[str, ...] = ()
    """A row ends when its text contains one of these."""
    stop_at_eos: bool = True
    """A row ends at an end-of-text token."""
    seed: int = 0
    """Key of every random draw."""
    batch_size: int = 64
    """Rows decoded together."""

    def __post_init__(self) -> None:
        for name, bad, rule in (
            ("max_new_tokens", self.max_new_tokens < 1, "at least 1"),
            ("temperature", not (self.temperature == 0 or 1e-6 <= self.temperature < 1e6), "0, or from 1e-6 to 1e6"),
            ("top_p", not 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("batch_size", self.batch_size < 1, "at least 1"),
        ):
            if bad:
                raise UserError(f"{name} = {getattr(self, name)}", f"it must be {rule}", "change it")


@dataclass
class Decoded:
    """What was decoded, one entry per row. Rows are prompts, each `repeats` times, copies side by side."""

    prompts: list[list[int]]
    forced: list[list[int]]
    """Tokens that were given as the beginning of the continuation."""
    token_ids: list[list[int]]
    """Tokens fed after prompt and forced tokens; with a teacher, the teacher's."""
    decided_ids: list[list[int]]
    """Tokens that this call chose; the same as `token_ids` unless there was a teacher."""
    texts: list[str]
    """Continuations as text, forced tokens included, special tokens and everything from a stop string on left out."""
    token_logp: list[list[float]]
    """Log-probability of each token fed, under the model as steered, at temperature 1, among its whole vocabulary."""
    decided_logp: list[list[float]]
    """The same of each token that this call chose; the difference says how near a tie a teacher's other token was."""
    entropy: list[list[float]]
    """Entropy of each next-token distribution over the whole vocabulary, in nats, at temperature 1."""
    finish: list[str]
    """Why each row ended: `eos`, `stop` or `length`."""
    sample: list[int]
    branch: list[int]
    edits: EditLog
    """Every edit that shaped a row, ordered by row, position and site. Those of a shared prefill are listed for each
    copy, although they were applied once."""
    repeats: int = 1
    """Rows per prompt."""
    allowed_logp: list[list[list[float]]] = field(default_factory=list)
    """Per row and step, the log-probability of each of the row's allowed tokens, in the order given, among the whole
    vocabulary; empty unless tokens were restricted. Differences of two are differences of their logits."""

    def __len__(self) -> int:
        return len(self.prompts)

    def first_position(self, row: int) -> int:
        """Absolute position of a row's first token in `token_ids`."""
        return len(self.prompts[row]) + len(self.forced[row])


Observe = Callable[[Int[Tensor, " B"], int, Float[Tensor, "B V"]], None]
"""Called before each choice with the unfinished rows of a batch, how many tokens each has chosen, and their logits,
which stay as they are and may be kept."""


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | None = None,
    source: InterventionSource | None = None,
    *,
    forced: Sequence[Sequence[int]] | None = None,
    repeats: int = 1,
    teacher: Sequence[Sequence[int]] | None = None,
    samples: Sequence[int] | None = None,
    branches: Sequence[int] | None = None,
    allowed: Sequence[Sequence[int]] | None = None,
    prompt_cache: PromptCache | None = None,
    progress: Callable[[int], None] | None = None,
    observe: Observe | None = None,
) -> Decoded:
    """Decode continuations of prompts, steered by a source if there is one.

    Args:
        model: the model.
        prompts: token ids, one non-empty list per prompt.
        config: how tokens are chosen.
        source: decides edits at its sites and positions.
        forced: per prompt, tokens with which its continuation begins (a fork's past).
        repeats: decode every prompt this many times from one prefill. Copies may be edited differently from the token
            before the first free one on; what lies below the first edited site is computed once for all of them there.
        teacher: per row, tokens to feed instead of the chosen ones; rows end where it ends. What would have been chosen
            is in `decided_ids`.
        samples: per prompt, its key for random draws (its index by default).
        branches: per row, its fork's number (0 by default, the copy's number with `repeats`).
        allowed: per prompt, the tokens among which each of its tokens is chosen, such as the letters of the options.
            Temperature and `top_p` then act on the model's distribution renormalised over them. Log-probabilities and
            entropies stay those of the model's own distribution over the whole vocabulary, so that `exp(decided_logp)`
            says what share the model itself gave the token; `allowed_logp` holds those of all allowed tokens.
        prompt_cache: holds the keys and values of prompts from call to call. Not used where a source asks for positions
            before the last prompt token, where tokens are forced, or a prompt is a single token.
        progress: called with the number of rows whenever some have ended.
        observe: shown the logits of every choice; see `Observe`.

    Returns:
        Tokens, texts, log-probabilities and the log of edits.

    Raises:
        UserError: a prompt is empty, holds an unknown token, or the rows exceed the model's context; no token is
            allowed, or one that the model does not have.
        RuntimeError: edits applied are not the positions asked for.
    """
    config = config or DecodeConfig()
    rows = _Rows.of(model, prompts, forced, repeats, samples, branches, config, teacher, allowed)
    runner = None
    if source is not None:
        runner = SourceRunner(model, source)
        source.start(
            DecodeStart(rows.prompts, rows.sample, rows.branch, config.seed, config.max_new_tokens, model.device)
        )
    group = max(1, config.batch_size // repeats) * repeats
    for start in range(0, len(rows.prompts), group):
        members = list(range(start, min(start + group, len(rows.prompts))))
        _decode_group(model, rows, members, repeats, config, runner, prompt_cache, progress, observe)
    decoded = rows.result(model, config, repeats, runner.finish() if runner else EditLog.empty())
    if runner is not None:
        _check_edits(decoded, runner)
        decoded.edits = _with_inherited_edits(decoded)
    return decoded


def check_prompts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    forced: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raise a `UserError` if `decode` would refuse these prompts."""
    if not prompts:
        raise UserError("the prompts", "there is none", "give at least one")
    limit = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    vocab_size = model.vocab_size
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i}", "it is empty", "give at least one token")
        if not all(0 <= token < vocab_size for token in (*prompt, *(forced[i] if forced else ()))):
            raise UserError(f"prompt {i}", f"{model.name} has tokens 0 to {vocab_size - 1}", "tokenise again")
        length = len(prompt) + (len(forced[i]) if forced else 0) + config.max_new_tokens
        if limit and length > limit + 1:
            raise UserError(
                f"prompt {i} and {config.max_new_tokens} new tokens",
                f"together {length} tokens, but {model.name} holds {limit}",
                "shorten the prompt or lower max_new_tokens",
            )


class _Rows:
    """The state of all rows of one decode call."""

    def __init__(self, prompts: list[list[int]], forced: list[list[int]], teacher: list[list[int]] | None) -> None:
        self.prompts, self.forced, self.teacher = prompts, forced, teacher
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.decided: list[list[int]] = [[] for _ in prompts]
        self.logp: list[list[float]] = [[] for _ in prompts]
        self.decided_logp: list[list[float]] = [[] for _ in prompts]
        self.entropy: list[list[float]] = [[] for _ in prompts]
        self.finish = ["length"] * len(prompts)
        self.allowed: AllowedTokens | None = None
        self.allowed_logp: list[list[list[float]]] = []
        self.sample = self.branch = torch.empty(0, dtype=torch.long)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        forced: Sequence[Sequence[int]] | None,
        repeats: int,
        samples: Sequence[int] | None,
        branches: Sequence[int] | None,
        config: DecodeConfig,
        teacher: Sequence[Sequence[int]] | None,
        allowed: Sequence[Sequence[int]] | None,
    ) -> _Rows:
        if repeats < 1:
            raise UserError(f"repeats = {repeats}", "it must be at least 1", "change it")
        check_prompts(model, prompts, config, forced)
        copies = [i for i in range(len(prompts)) for _ in range(repeats)]
        rows = cls(
            [list(prompts[i]) for i in copies],
            [list(forced[i]) if forced else [] for i in copies],
            None if teacher is None else [list(t) for t in teacher],
        )
        keys = list(range(len(prompts))) if samples is None else list(samples)
        forks = list(range(repeats)) * len(prompts) if branches is None else list(branches)
        for name, values, expected in (("samples", keys, len(prompts)), ("branches", forks, len(copies))):
            assert len(values) == expected, f"{name} has {len(values)} entries, not {expected}"
        assert rows.teacher is None or len(rows.teacher) == len(copies)
        rows.sample = torch.tensor([keys[i] for i in copies], device=model.device)
        rows.branch = torch.tensor(forks, device=model.device)
        if allowed is not None:
            assert len(allowed) == len(prompts), f"allowed has {len(allowed)} entries, not {len(prompts)}"
            rows.allowed = AllowedTokens.of([allowed[i] for i in copies], model.vocab_size, model.device)
            rows.allowed_logp = [[] for _ in copies]
        return rows

    def prefix(self, row: int) -> list[int]:
        return self.prompts[row] + self.forced[row]

    def result(self, model: LanguageModel, config: DecodeConfig, repeats: int, edits: EditLog) -> Decoded:
        texts = []
        for row, ids in enumerate(self.tokens):
            text = model.decode_ids(self.forced[row] + ids)
            if self.finish[row] == "stop":
                text = text[: min(text.find(s) for s in config.stop if s in text)]
            texts.append(text)
        return Decoded(
            self.prompts, self.forced, self.tokens, self.decided, texts, self.logp, self.decided_logp, self.entropy,
            self.finish, self.sample.tolist(), self.branch.tolist(), edits, repeats, self.allowed_logp,
        )  # fmt: skip


def _decode_group(
    model: LanguageModel,
    rows: _Rows,
    members: list[int],
    repeats: int,
    config: DecodeConfig,
    runner: SourceRunner | None,
    prompt_cache: PromptCache | None,
    progress: Callable[[int], None] | None,
    observe: Observe | None,
) -> None:
    """Decode rows that share a cache: prefill, then one token for every unfinished row at a time."""
    device = model.device
    prefixes = [rows.prefix(row) for row in members]
    parting = parting_layer(model, runner, repeats)
    longest = max(map(len, prefixes))
    reserve = longest + max(config.max_new_tokens, 1 if parting is None else repeats)
    cache = model.new_cache(reserve=reserve)
    active = torch.tensor(members, device=device)
    prompt_length = torch.tensor([len(rows.prompts[row]) for row in members], device=device)
    heads = [prefix[:-1] for prefix in prefixes[::repeats]]
    untouched = runner is None or runner.source.positions.kind == "generated"
    untouched = untouched and not any(rows.forced[row] for row in members)  # a fork's past may hold edits
    held = prompt_cache is not None and untouched and all(heads)
    if prompt_cache is not None and held:
        cache = prompt_cache.load(heads, reserve)
    with edited(model, runner.edits()) if runner else nullcontext():
        if repeats > 1 or held:  # everything but the last token once per prompt
            kept = [head for head in heads if head]
            if kept and not held:
                assert len(kept) == len(heads), "repeats need prompts of at least two tokens, or all of one"
                prefill(
                    model,
                    TokenBatch.pad(heads, model.pad_id, device),
                    cache,
                    active[::repeats],
                    prompt_length[::repeats],
                    runner,
                )
            held_tokens = torch.tensor([len(p) - 1 for p in prefixes], device=device)
            ids = torch.tensor([p[-1] for p in prefixes], device=device)
            if parting is not None:
                logits = step_copies(
                    model, ids[::repeats], cache, held_tokens[::repeats], active.view(-1, repeats),
                    prompt_length[::repeats], runner, parting,
                )  # fmt: skip
            else:
                if kept and repeats > 1:
                    cache.repeat(repeats)
                logits = step(model, ids, cache, held_tokens, active, prompt_length, runner)
        else:
            batch = TokenBatch.pad(prefixes, model.pad_id, device)
            logits = prefill(model, batch, cache, active, prompt_length, runner)
        length = torch.tensor([len(p) for p in prefixes], device=device)
        for number in range(config.max_new_tokens):
            if observe is not None:
                observe(active, number, logits)
            ids, done = _choose(model, rows, active, length, logits, config)
            if progress and done.any():
                progress(int(done.sum()))
            done_count = int(done.sum())
            if done_count == len(active) or number == config.max_new_tokens - 1:
                if progress and done_count < len(active):
                    progress(len(active) - done_count)
                return
            if number == 0 and parting is not None:
                cache.unfold(repeats, parting, reserve=longest + config.max_new_tokens)
            if done_count:
                keep = (~done).nonzero()[:, 0]
                cache.select(keep)
                active, length, prompt_length, ids = active[keep], length[keep], prompt_length[keep], ids[keep]
            logits = step(model, ids, cache, length, active, prompt_length, runner)
            length = length + 1


def _choose(
    model: LanguageModel, rows: _Rows, active: Tensor, length: Tensor, logits: Tensor, config: DecodeConfig
) -> tuple[Tensor, Tensor]:
    """Choose and record each row's next token; say which rows end with it."""
    u = None
    if config.temperature > 0:
        u = uniform(config.seed, rows.sample[active], rows.branch[active], length - 1)
    if rows.allowed is None:
        decided = choose_token(logits, config.temperature, config.top_p, u)
    else:
        decided = rows.allowed.choose(active, logits, config.temperature, config.top_p, u)
    ids = decided
    members = active.tolist()
    if rows.teacher is not None:
        ids = torch.tensor([rows.teacher[row][len(rows.tokens[row])] for row in members], device=decided.device)
    logp, entropy = token_statistics(logits, ids)
    decided_logp = logp
    if rows.teacher is not None:
        decided_logp = logp + (logits.gather(1, decided[:, None]) - logits.gather(1, ids[:, None]))[:, 0].float()
    if rows.allowed is not None:
        total = logits.gather(1, ids[:, None])[:, 0].float() - logp
        for row, values in zip(members, rows.allowed.log_probabilities(active, logits, total), strict=True):
            rows.allowed_logp[row].append(values)
    done = []
    columns = zip(members, *(c.tolist() for c in (ids, decided, logp, decided_logp, entropy)), strict=True)
    for row, token, chosen, token_logp, chosen_logp, token_entropy in columns:
        rows.tokens[row].append(token)
        rows.decided_logp[row].append(chosen_logp)
        rows.decided[row].append(chosen)
        rows.logp[row].append(token_logp)
        rows.entropy[row].append(token_entropy)
        done.append(_ended(model, rows, row, config))
    return ids, torch.tensor(done, device=decided.device)


def _ended(model: LanguageModel, rows: _Rows, row: int, config: DecodeConfig) -> bool:
    if config.stop_at_eos and rows.tokens[row][-1] in model.eos_ids:
        rows.finish[row] = "eos"
        return True
    if config.stop:
        text = model.decode_ids(rows.forced[row] + rows.tokens[row])
        if any(s in text for s in config.stop):
            rows.finish[row] = "stop"
            return True
    return rows.teacher is not None and len(rows.tokens[row]) == len(rows.teacher[row])


def _check_edits(decoded: Decoded, runner: SourceRunner) -> None:
    """Every position that the rule asks for was shown to the source once per site, and none other."""
    places: list[tuple[int, int]] = []
    for row, prompt in enumerate(decoded.prompts):
        prefix = len(prompt) + len(decoded.forced[row])
        # Copies of a prompt share the prefill of the first, up to the last forced token.
        first = 0 if row % decoded.repeats == 0 else prefix - 1
        places += [(row, position) for position in range(first, prefix + len(decoded.token_ids[row]) - 1)]
    row, position = torch.tensor(places).T
    prompt_length = torch.tensor([len(prompt) for prompt in decoded.prompts])
    selected = runner.source.positions.selects(position, prompt_length[row])
    asked = {place for place, kept in zip(places, selected.tolist(), strict=True) if kept}
    for index, site in enumerate(runner.sites):
        seen = runner.visits(index)
        if len(seen) != len(asked) or set(seen) != asked:
            raise RuntimeError(
                f"{len(seen)} places edited at {site}, {len(asked)} asked for: the hooks did not see each position once"
            )


def _with_inherited_edits(decoded: Decoded) -> EditLog:
    """The log with the edits of each shared prefill listed for every copy of the prompt."""
    log, repeats = decoded.edits, decoded.repeats
    prefix = torch.tensor([decoded.first_position(row) for row in range(len(decoded))])
    shared = (log.position < prefix[log.row] - 1).nonzero()[:, 0]
    if repeats == 1 or len(shared) == 0:
        return log
    copies = [replace(log.take(shared), row=log.row[shared] + copy) for copy in range(1, repeats)]
    return EditLog.cat([log, *copies]).sorted()
