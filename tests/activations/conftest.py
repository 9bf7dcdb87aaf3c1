from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from trimtab.activations import Document
from trimtab.activations.shards import read_index

WORDS = [
    "the",
    "tide",
    "and",
    "boat",
    "turned",
    "then",
    "an",
    "anchor",
    "in",
    "harbour",
    "over",
    "water",
    "her",
    "reef",
]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Forty short texts, some of them chats."""
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(8, 40))) for _ in range(40)]
    return [
        Document(f"doc-{i}", f"<user>{text}<eos><model>ay<eos>" if i % 5 == 0 else text, "test")
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def stored_rows() -> Callable[..., dict[str, Any]]:
    """Read all rows of a split as `x`, in the order of the files, and each column of their origins."""

    def read(directory: Path, split: str = "train", site: str = "resid_post.1") -> dict[str, Any]:
        shards = read_index(directory).of(split)
        x = torch.cat([load_file(directory / shard.sites[site].name)["rows"] for shard in shards]).float()
        origin = pa.concat_tables([pq.read_table(directory / shard.origin.name) for shard in shards])
        return {"x": x, **{name: origin[name].to_numpy() for name in origin.column_names}}

    return read
