"""How strongly and how often each feature fires over a corpus: what doses and live masks are computed from.

The table lies beside a dictionary's weights as `feature_stats.parquet`, one row per feature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.dictionaries.sparse import ActivePairs, SparseCodes
from trimtab.errors import UserError
from trimtab.runs import as_path, write_table

FORMAT = 1
"""Version of the table; another one is refused."""
_COLUMNS = {"max_activation": np.float32, "mean_activation": np.float32, "firing_rate": np.float64}
_ABOUT = {"n_tokens": int, "corpus_hash": str, "sink_filter": str}


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Statistics of `n` features over `n_tokens` activations, in model units."""

    max_activation: NDArray[np.float32]
    """`[n]` m_i = max f_i·‖W_dec[i]‖: how far the feature ever moved a reconstruction; 0 if it never fired."""
    mean_activation: NDArray[np.float32]
    """`[n]` mean of f_i·‖W_dec[i]‖ over the tokens where it fired; 0 if it never did."""
    firing_rate: NDArray[np.float64]
    """`[n]` share of tokens where f_i > 0."""
    n_tokens: int
    """Activations counted, those that the sink filter left out excepted."""
    corpus_hash: str = ""
    """Hash of the corpus; empty if unknown."""
    sink_filter: str = ""
    """Which activations were left out, in words ("position 0; norm > 10 × median"); empty if none."""

    def __repr__(self) -> str:
        return f"<FeatureStats: {self.live.sum():,} of {self.n_features:,} features fired on {self.n_tokens:,} tokens>"

    @property
    def n_features(self) -> int:
        return len(self.firing_rate)

    @property
    def live(self) -> NDArray[np.bool_]:
        """`[n]` the features that fired at all."""
        return self.firing_rate > 0

    def to_table(self) -> pa.Table:
        """One row per feature; what belongs to all of them is in the schema's metadata."""
        about = {"format": FORMAT, **{name: getattr(self, name) for name in _ABOUT}}
        columns = {"feature": np.arange(self.n_features, dtype=np.int32)}
        columns |= {name: np.asarray(getattr(self, name), dtype) for name, dtype in _COLUMNS.items()}
        return pa.table(columns).replace_schema_metadata({"trimtab.feature_stats": json.dumps(about)})

    def write(self, path: str | Path) -> None:
        """Write the table as Parquet, whole. Raises `UserError` if the disk refuses."""
        write_table(path, self.to_table())

    @classmethod
    def read(cls, path: str | Path, *, n_features: int | None = None) -> FeatureStats:
        """Read `feature_stats.parquet`.

        Raises:
            UserError: the file is missing or damaged, is another kind of table, or has not `n_features` rows.
        """
        path = as_path(path, "the statistics")
        hint = "compute the statistics again"
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[b"trimtab.feature_stats"])
            if about["format"] != FORMAT:
                raise UserError(str(path), f"it has format {about['format']}, this version reads {FORMAT}", hint)
            columns = {name: table.column(name).to_numpy().astype(dtype) for name, dtype in _COLUMNS.items()}
            stats = cls(**columns, **{name: kind(about[name]) for name, kind in _ABOUT.items()})
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(str(path), "no such file", hint) from None
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(str(path), f"not readable as feature statistics ({reason})", hint) from error
        if n_features is not None and stats.n_features != n_features:
            raise UserError(str(path), f"it describes {stats.n_features} features, not {n_features}", hint)
        for name in _COLUMNS:
            values = getattr(stats, name)
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise UserError(f"column {name} of {path}", "it holds values that are negative or not finite", hint)
        return stats


class FeatureStatsAccumulator:
    """Collects `FeatureStats` from one batch of codes after another.

    Args:
        decoder_norms: `[n]` ‖W_dec[i]‖; codes times these are in model units. Sums are kept on its device.
    """

    def __init__(self, decoder_norms: Float[Tensor, " n"]) -> None:
        self._norms = decoder_norms.detach().double()
        self._max = torch.zeros_like(self._norms)
        self._sum = torch.zeros_like(self._norms)
        self._fired = torch.zeros(self._norms.shape, dtype=torch.int64, device=self._norms.device)
        self.n_tokens = 0

    @torch.no_grad()
    def update(self, codes: Float[Tensor, "... n"] | SparseCodes | tuple[Tensor, Tensor] | ActivePairs) -> None:
        """Count one batch.

        Args:
            codes: as `Dictionary.in_model_units` gives them: dense codes, (values `[..., k]`, indices `[..., k]`), or
                pairs. A feature may be listed with code 0, which does not count as firing, but not twice in one row.
        """
        device = self._norms.device
        if isinstance(codes, Tensor):
            f = codes.to(device).reshape(-1, len(self._norms)).clamp_min(0)
            self.n_tokens += len(f)
            self._max = torch.maximum(self._max, f.amax(0).double()) if len(f) else self._max
            self._sum += f.sum(0, dtype=torch.float64)
            self._fired += (f > 0).sum(0)
            return
        values, indices, *_ = codes
        self.n_tokens += len(codes.start) - 1 if isinstance(codes, ActivePairs) else values.shape[:-1].numel()
        values, indices = values.to(device).flatten().double(), indices.to(device).flatten().long()
        fires = values > 0
        values, indices = values[fires], indices[fires]
        self._max.scatter_reduce_(0, indices, values, "amax")
        self._sum.index_add_(0, indices, values)
        self._fired += torch.bincount(indices, minlength=len(self._norms))

    def state(self) -> dict[str, Tensor]:
        """All that was counted, by name, as `restore` takes it."""
        return {"max": self._max, "sum": self._sum, "fired": self._fired, "n_tokens": torch.tensor(self.n_tokens)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._max, self._sum, self._fired = (state[name].to(self._norms.device) for name in ("max", "sum", "fired"))
        self.n_tokens = int(state["n_tokens"])

    def result(self, *, corpus_hash: str = "", sink_filter: str = "") -> FeatureStats:
        """The statistics of everything counted so far."""
        fired = self._fired.double()
        return FeatureStats(
            max_activation=(self._max * self._norms).float().cpu().numpy(),
            mean_activation=(self._sum * self._norms / fired.clamp_min(1)).float().cpu().numpy(),
            firing_rate=(fired / max(self.n_tokens, 1)).cpu().numpy(),
            n_tokens=self.n_tokens,
            corpus_hash=corpus_hash,
            sink_filter=sink_filter,
        )
