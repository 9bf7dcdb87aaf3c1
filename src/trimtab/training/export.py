"""From trained weights to a dictionary: threshold, scale, statistics and metrics from held-out rows, file."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.core_metrics import CoreMetrics, CoreMetricsAccumulator
from trimtab.dictionaries.feature_stats import FeatureStatsAccumulator
from trimtab.dictionaries.files import save_dictionary
from trimtab.dictionaries.folding import fold_scale
from trimtab.dictionaries.sae import SAE
from trimtab.dictionaries.trainable import TrainableSAE
from trimtab.runs import Run
from trimtab.training.config import TrainConfig
from trimtab.training.result import TrainResult, reached
from trimtab.training.rows import SiteRows

SAE_DIRECTORY = "sae"
BLOCK_ROWS = 512


def export(
    config: TrainConfig,
    trained: TrainableSAE,
    scale: float,
    rows: SiteRows,
    run: Run,
    steps: int,
    seconds: float,
) -> TrainResult:
    """Set what inference needs beyond the weights, fold the scale, measure, and save as `sae/` in the run."""
    measured = rows.measured(config.heldout_rows)
    calibration = trained.calibrate(measured.to(trained.b_dec.device) * scale)
    description = (rows.heldout or rows.source).description
    info = DictionaryInfo(
        architecture=trained.architecture,
        model=str(description.get("model", "")),
        site=str(description.get("site", "")),
        metadata={
            "source": {name: value for name, value in rows.source.description.items() if name not in ("model", "site")},
            "input_scale": scale,
            "model_fingerprint": str(description.get("model_fingerprint", "")),
            "scaling": config.scaling,
            "rows": steps * config.batch_size,
            "lr": config.peak_lr,
            "batch_size": config.batch_size,
            "seed": config.seed,
            **({"calibration": calibration} if calibration else {}),
        },
    )
    sae = fold_scale(trained.export(info), scale)
    if config.save_dtype == "float16":  # statistics and fingerprint are of the weights that readers will see
        for weight in (sae.W_enc, sae.W_dec):
            weight.data = weight.data.half().float()
    metrics = measure(sae, measured, description)
    path = save_dictionary(sae, run.file(SAE_DIRECTORY), dtype=config.save_dtype)
    target = config.l0_target
    return TrainResult(
        sae=path,
        fingerprint=sae.fingerprint,
        steps=steps,
        rows=steps * config.batch_size,
        explained_variance=metrics.explained_variance,
        l0=metrics.l0,
        l0_target=target,
        l0_reached_target=reached(metrics.l0, target),
        sparsity_weight=trained.metrics().get("sparsity_weight"),
        dead_share=metrics.dead_share,
        dense_share=metrics.dense_share,
        measured_rows=metrics.n_rows,
        heldout=rows.heldout is not None,
        input_scale=scale,
        seconds=seconds,
    )


@torch.no_grad()
def measure(sae: SAE, rows: Float[Tensor, "m d"], description: dict[str, object]) -> CoreMetrics:
    """Core metrics of an SAE on rows in its units; its `feature_stats` are set on the way, with the corpus hash and the
    filter that the description of the rows' source tells."""
    device = sae.W_dec.device
    core = CoreMetricsAccumulator(sae.d_in, sae.n_features, device)
    stats = FeatureStatsAccumulator(sae.decoder_norms)
    for block in rows.split(BLOCK_ROWS):
        x = block.to(device)
        codes = sae.encode_sparse(x)
        core.update(x, sae.decode_sparse(codes), codes, torch.zeros(len(x), dtype=torch.long, device=device))
        stats.update(codes)
    corpus, kept_out = description.get("corpus_hash", ""), ""
    if "outlier_norm" in description:
        special = "; special tokens" if description.get("drop_special") else ""
        kept_out = f"position 0{special}; norm > {description['outlier_norm']} × median"
    sae.feature_stats = stats.result(
        corpus_hash=" ".join(map(str, corpus)) if isinstance(corpus, list | tuple) else str(corpus),
        sink_filter=kept_out,
    )
    return core.metrics()
