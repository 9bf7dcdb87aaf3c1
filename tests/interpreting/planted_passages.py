"""Passages of nonsense in which a feature fires on one word, or that have a concept: the right answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trimtab.interpreting import Exemplars, Passage

FILLER = """
    the old man said that it was a long way from here and then she went over there with her brother to see what they
    could do about this house before some other people came in at night because no one had been so kind for years
""".split()  # noqa: SIM905
CONCEPTS = {"sea": "harbour", "kitchen": "kettle", "law": "verdict"}


def passage(
    rng: np.random.Generator, word: str = "", length: int = 14, *, fires: str = "", known: bool = True
) -> Passage:
    """Filler with a word somewhere, in tokens with a leading blank, firing on `fires`."""
    words = rng.choice(FILLER, size=length).tolist()
    if word:
        words[int(rng.integers(length))] = word
    tokens = tuple(f" {one}" for one in words)
    return Passage(tokens=tokens, activations=tuple(3.0 * (one == fires) for one in words) if known else ())


def planted(rng: np.random.Generator, word: str, count: int = 10, lacking: int = 20) -> Exemplars:
    """Exemplars of a feature that fires on a word."""
    return Exemplars(
        name=word,
        has=tuple(passage(rng, word, fires=word) for _ in range(count)),
        lacks=tuple(passage(rng) for _ in range(lacking)),
    )


def axbench_files(directory: Path, seed: int = 0) -> Path:
    """Labelled answers in AxBench's layout."""
    rng = np.random.default_rng(seed)
    number = iter(range(10_000))

    def row(concept: int, name: str, category: str, word: str) -> dict[str, object]:
        answer = passage(rng, word, 24, known=False).text.strip()
        return {
            "input": f"Tell me about subject{next(number)} please",
            "output": f"{answer} {next(number)}",
            "output_concept": name,
            "category": category,
            "concept_id": concept,
        }

    train = [row(-1, "EEEEE", "negative", "") for _ in range(30)]
    test: list[dict[str, object]] = []
    for concept, (name, word) in enumerate(CONCEPTS.items()):
        train += [row(concept, name, "positive", word) for _ in range(16)]
        test += [row(concept, name, "positive", word) for _ in range(8)]
        test += [row(concept, name, "negative", "") for _ in range(8)]
        test += [row(concept, name, "hard negative", f"{word}less") for _ in range(2)]
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(train), directory / "a_train_data.parquet")
    pq.write_table(pa.Table.from_pylist(test), directory / "a_latent_eval_data.parquet")
    return directory
