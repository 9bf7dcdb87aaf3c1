"""Some causal-LM types of the installed `transformers`: right to 1e-4, or refused by name. The sweep has them all."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers
from tests.lm.captured_steps import why_not_captured
from tests.lm.right_or_refused import faults
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma3n import modeling_gemma3n

from trimtab import cli
from trimtab.lm import DecodeConfig, DecodeStream, PromptCache, Row, decode, survey
from trimtab.lm.capabilities import Capabilities
from trimtab.lm.slotted_cache import SlottedLayer
from trimtab.lm.zoo import Zoo, ZooEntry, build_tiny, causal_lm_types

PAGE = Path(__file__).parents[2] / "docs" / "results" / "models.md"

SOME = ("falcon", "gemma2", "gpt_bigcode", "gpt_neo", "lfm2", "mamba", "phi", "qwen3_next", "roberta")
"""Types of as many kinds: fused heads, norms behind branches, one key head, a window that is built in, a hybrid, a
state, parallel branches, gated queries, positions that begin elsewhere."""


@pytest.mark.parametrize("model_type", SOME)
def test_types_are_right_or_refused(model_type: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert model_type in causal_lm_types()
    assert faults(build_tiny(model_type, tiny_tokenizer)) == []


@pytest.mark.parametrize(
    ("model_type", "kept_on"),
    [("gpt_bigcode", "attn_v"), ("roberta", "positions"), ("mamba", "decode"), ("bert", "logit-lens")],
)
def test_what_is_off_would_be_wrong(model_type: str, kept_on: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each refusal is needed: with one capability left on, numbers differ, or what has no cache is refused."""
    model = build_tiny(model_type, tiny_tokenizer)
    off = {name: why for name, why in model.capabilities.off.items() if name not in (kept_on, "prefix")}
    assert kept_on in model.capabilities.off
    model.assume(Capabilities(off=off))
    found = faults(model)
    refused = [fault for fault in found if "refused for no reason" in fault]
    if model_type == "mamba":
        assert len(refused) == len(found) == 2
        assert all("layers with a state other than keys and values" in fault for fault in refused)
    else:
        assert set(found) - set(refused)


OF_GEMMA_3N = (
    "modeling_gemma3n.py, forward: epsilon_tensor = torch.tensor("
    if "epsilon_tensor = torch.tensor(" in inspect.getsource(modeling_gemma3n)
    else ""
)
"""Older versions of `transformers` bring a number to the device at each step."""


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt2", ""),
        ("gemma3", ""),
        ("gemma3n_text", OF_GEMMA_3N),
        ("mllama", ""),
        ("gpt_neo", "behind a cache of a fixed size it fails or gives other logits"),
        ("xglm", "modeling_xglm.py, forward: "),
        ("mamba", None),
    ],
)
def test_whose_steps_can_be_captured(
    model_type: str, why: str | None, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep has all types. Mutation: a cache that asks where the next token goes."""
    model = build_tiny(model_type, tiny_tokenizer)
    found = why_not_captured(model)
    assert found == why if not why else (found or "").startswith(why)
    if found == "":
        monkeypatch.setattr(SlottedLayer, "get_seq_length", lambda self: int(self.place))
        assert "get_seq_length" in (why_not_captured(model) or "")


@pytest.mark.parametrize("model_type", ["gemma3n_text", "mllama"])
def test_layers_that_hold_nothing_are_decoded_around(model_type: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a stream whose rows join, of steps that are taken ahead, and behind prompts that are kept."""
    model, config = build_tiny(model_type, tiny_tokenizer), DecodeConfig(max_new_tokens=12, stop_at_eos=False)
    prompts = [[7, 8, 9], [*range(5, 17)]]
    alone = [decode(model, [prompt], config).token_ids[0] for prompt in prompts]
    found = decode(model, prompts, config, ahead=5)
    assert (found.token_ids, found.ahead) == (alone, [5, 5])
    kept = PromptCache(model, together=True)
    longer = [[*range(5, 17), 20 + i] for i in range(2)]  # which begin alike
    for _ in range(2):
        assert decode(model, prompts, config, prompt_cache=kept).token_ids == alone
        found = decode(model, longer, config, prompt_cache=kept).token_ids
        assert found == [decode(model, [prompt], config).token_ids[0] for prompt in longer]
    stream, rows = DecodeStream(model), [Row(prompt, config) for prompt in prompts]
    stream.add(rows[0])
    for number, _ in enumerate(stream):
        if number == 2:
            stream.add(rows[1])
    assert [row.token_ids for row in rows] == alone


def test_the_table_says_what_works_and_why_not(tmp_path, capsys) -> None:
    zoo = survey(["llama", "mamba", "blt"])
    llama, mamba, blt = zoo.entries
    assert (llama.off, llama.refused) == ({}, "")
    assert (llama.mark("decode"), mamba.mark("decode"), blt.mark("decode")) == ("✓", "–", "")
    assert "parameters at its smallest" in blt.refused
    assert zoo.summary.endswith("3 types. All works on 1, a part on 1; 1 are not run.")
    page = zoo.markdown()
    assert "All works on llama." in page
    assert "layers with a state other than keys and values" in page
    assert cli.main(["models", "zoo", "--type", "lama"]) == 2
    assert "did you mean llama?" in capsys.readouterr().err
    assert cli.main(["models", "zoo", "--type", "llama", "--page", str(tmp_path / "zoo.md"), "--json"]) == 0
    assert "All works on llama." in (tmp_path / "zoo.md").read_text()


def test_a_page_is_read_as_it_was_written() -> None:
    """Mutation: forget a type's earlier rows."""
    off = {"decode": "a | b", "attn_q": "of two: parts; both", "attn_k": "of two: parts; both"}
    entries = (
        ZooEntry(model_type="a"),
        ZooEntry(model_type="b", off=off),
        ZooEntry(model_type="c", refused="too | large"),
        ZooEntry(model_type="d"),
    )
    page = "# Title\n\n" + Zoo(transformers_version="5", entries=entries).markdown()
    assert read_page(page) == {"a": frozenset(), "b": frozenset(off), "c": None, "d": frozenset()}


def read_page(text: str) -> dict[str, frozenset[str] | None]:
    """Types on a page that `Zoo.markdown` wrote, with what does not work; None for those that are not run."""
    found: dict[str, frozenset[str] | None] = {}
    for line in text.splitlines():
        if line.startswith("All works on "):
            found |= dict.fromkeys(line.removeprefix("All works on ").strip(" .").split(", "), frozenset())
        elif line.startswith("| ") and not line.startswith("| type "):
            name, off, _ = line.strip("| ").split(" | ", 2)
            found[name] = None if off == "not run" else (found.get(name) or frozenset()) | {*off.split(", ")}
    return found


def on_the_page() -> dict[str, frozenset[str] | None]:
    """What the page says, if it is of this version of `transformers`."""
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}: " not in text:
        pytest.skip("the page is of another version of transformers")
    return read_page(text)


def found_here(types: Sequence[str]) -> dict[str, frozenset[str] | None]:
    return {e.model_type: None if e.refused else frozenset(e.off) for e in survey(types).entries}


def test_the_page_says_what_is_found_here() -> None:
    """No more is refused than the page says, nor less; on a sample, which the sweep completes."""
    page = on_the_page()
    sample = causal_lm_types()[5::16]
    assert found_here(sample) == {name: page[name] for name in sample}


@pytest.mark.slow
@pytest.mark.sweep
def test_the_whole_page_says_what_is_found_here() -> None:
    assert found_here(()) == on_the_page()


def test_counts_in_the_docs_are_the_pages() -> None:
    page = read_page(PAGE.read_text())
    whole, not_run = sum(off == frozenset() for off in page.values()), sum(off is None for off in page.values())
    part = len(page) - whole - not_run
    counts = f"{len(page)} types. All works on {whole}, a part on {part}; {not_run} are not run."
    assert counts in PAGE.read_text()
    said = f"of {len(page)} types of transformers"
    assert said in (PAGE.parents[1] / "models.md").read_text()
    assert (
        f"everything works on {whole}, a part on {part}, and {not_run} are not run"
        in (PAGE.parents[1] / "models.md").read_text()
    )
