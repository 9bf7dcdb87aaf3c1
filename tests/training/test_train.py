"""Training finds planted features, reports what it did, and refuses what cannot work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from planted_rows import MemorySource, Planted
from torch import Tensor

from trimtab.dictionaries import sparse as sparse_codes
from trimtab.dictionaries.architectures import TRAINABLE
from trimtab.dictionaries.base import DictionaryInfo
from trimtab.dictionaries.files import load_dictionary
from trimtab.errors import UserError
from trimtab.runs import Run, read_metrics
from trimtab.training import TrainConfig, export, train
from trimtab.training.checkpoint import checkpoint_files
from trimtab.training.optimiser import Adam
from trimtab.training.options import fields_of
from trimtab.training.rows import input_scale


def small(**settings: object) -> TrainConfig:
    base = {"n_features": 16, "k": 2, "rows": 1024, "batch_size": 64, "heldout_rows": 64}
    return TrainConfig(**(base | settings))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("arch", "k"), [("topk", 4), ("batchtopk", 3)])
def test_planted_superposed_features_are_recovered(tmp_path: Path, arch: str, k: int) -> None:
    planted = Planted(48, 24, active=3.0)
    source, heldout = MemorySource(planted.rows(20_000)), MemorySource(planted.rows(3_000), seed=1)
    config = TrainConfig(
        arch=arch,  # pyright: ignore[reportArgumentType]
        n_features=64,
        k=k,
        rows=80_000,
        batch_size=256,
        lr=5e-3,
        dead_after=5_000,
        heldout_rows=3_000,
    )
    with Run.open(tmp_path / "run", "train", config) as run:
        result = train(config, source, run, heldout=heldout)
    sae = load_dictionary(result.sae)
    best = (planted.directions @ sae.directions.T).max(dim=1).values
    assert (best > 0.95).float().mean() > 0.95
    assert result.heldout
    assert result.measured_rows == 3_000
    assert result.l0 == pytest.approx(k, rel=0.1)
    rows = heldout.rows
    residual = (rows - sae(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(1 - residual.item(), abs=1e-4)
    assert result.explained_variance > 0.8
    assert sae.info.site == "resid_post.0"
    assert sae.feature_stats is not None
    rate = (sae.encode(rows) > 0).double().mean(0)
    assert sae.feature_stats.firing_rate == pytest.approx(rate.numpy(), abs=1e-3)
    assert torch.allclose(sae.decoder_norms, torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("arch", TRAINABLE)
def test_every_field_of_every_architecture_can_be_set(arch: str) -> None:
    assert fields_of(arch) <= {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(arch=arch, n_features=40, l0=4)
    assert config.l0_target == 4
    assert config.build(8, 100).config.n_features == 40


@pytest.mark.parametrize("arch", TRAINABLE)
def test_a_training_by_automatic_differentiation_is_the_same_to_rounding(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, results = small(arch=arch, k=None, l0=2, n_features=64, log_every=4), []
    for by_autograd in (False, True):
        source = MemorySource(Planted(12, 8, 2.0).rows(400))
        if by_autograd:
            monkeypatch.setattr(TRAINABLE[arch], "gradients", None)  # those that are written out
        with Run.open(tmp_path / str(by_autograd), "train", config) as run:
            result = train(config, source, run, by_autograd=by_autograd)
            results.append([result.explained_variance, result.l0, *(line["loss"] for line in read_metrics(run.path))])
    assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.parametrize("sparse", [True, False])
def test_measured_lists_and_tables_of_codes_agree(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_codes, "SPARSE_BELOW", 1.0 if sparse else 0.0)
    rows = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    trained = TrainConfig(arch="batchtopk", k=3, n_features=40).build(8, 10)
    trained.calibrate(rows)
    sae = trained.export(DictionaryInfo(architecture="batchtopk"))
    metrics = export.measure(sae, rows, {})
    f = sae.encode(rows)
    x_hat = f @ sae.W_dec + sae.b_dec
    expected = 1 - (rows - x_hat).square().sum() / (rows - rows.mean(0)).square().sum()
    assert metrics.explained_variance == pytest.approx(expected.item(), abs=1e-5)
    assert metrics.l0 == pytest.approx((f > 0).sum(1).double().mean().item())
    assert sae.feature_stats is not None
    assert sae.feature_stats.max_activation == pytest.approx(f.max(0).values.numpy(), rel=1e-5)
    assert sae.feature_stats.firing_rate == pytest.approx((f > 0).double().mean(0).numpy())


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_adam_follows_its_definition_with_clipping(clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(3, 4).double()
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    adam = Adam(module, betas=(0.9, 0.99), clip_norm=clip_norm)
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, 5):
        gradients = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()}
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].clone()
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert adam.step(0.1 / step) == pytest.approx(norm)
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, weight in weights.items():
            g = gradients[name] * factor
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.99 * second[name] + 0.01 * g * g
            estimate = (second[name] / (1 - 0.99**step)).sqrt() + 1e-8
            weight -= 0.1 / step * first[name] / (1 - 0.9**step) / estimate
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, weights[name], rtol=1e-6), name


def test_metrics_are_logged_and_the_saved_scale_is_the_one_used(tmp_path: Path) -> None:
    source = MemorySource(50 * Planted(12, 8, 2.0).rows(400))
    with Run.open(tmp_path / "run", "train", {}) as run:
        result = train(small(log_every=8, scaling="unit"), source, run)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [8, 16]
    names = {"loss", "explained_variance", "l0", "aux", "grad_norm", "lr", "k", "dead_features", "rows_per_second"}
    assert names <= lines[0].keys()
    assert lines[0]["loss"] < 1.5  # E‖x‖² = 1 in training, 2,500 times that in model units
    assert result.input_scale == pytest.approx(source.rows.double().square().sum(1).mean().rsqrt().item(), rel=0.05)
    assert not result.heldout


@pytest.mark.parametrize(("scaling", "power", "target"), [("sqrt_d", 1, math.sqrt(8)), ("unit", 2, 1.0)])
def test_input_scale_gives_the_named_mean(scaling: str, power: int, target: float) -> None:
    rows = 30 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3
    scaled = input_scale(rows, scaling) * rows
    assert scaled.norm(dim=1).pow(power).mean().item() == pytest.approx(target, rel=1e-5)
    assert input_scale(rows, "none") == 1.0


def test_schedules_have_the_documented_corners() -> None:
    config = small(warmup_share=0.1, decay_share=0.5)
    assert config.lr_factor(0, 100) == pytest.approx(0.1)
    assert config.lr_factor(9, 100) == config.lr_factor(50, 100) == 1.0
    assert config.lr_factor(75, 100) == pytest.approx(0.5)
    assert config.lr_factor(99, 100) == pytest.approx(0.02)
    assert small(warmup_share=0.5).lr_factor(0, 10_000) == pytest.approx(1e-3)  # at most 1,000 steps of warm-up
    assert small(decay="cosine", decay_share=0.5).lr_factor(75, 100) == pytest.approx(0.5)
    assert small(decay="cosine", decay_share=0.5).lr_factor(90, 100) == pytest.approx((1 - math.cos(0.2 * math.pi)) / 2)
    assert small(decay="none").lr_factor(99, 100) == 1.0
    assert config.first_averaged_step(100) == 50


def test_averaged_weights_are_the_ones_saved(tmp_path: Path) -> None:
    source = MemorySource(Planted(12, 8, 2.0).rows(400))
    saved = []
    for decay in (0.0, 0.9):
        with Run.open(tmp_path / f"{decay}", "train", {}) as run:
            saved.append(load_dictionary(train(small(ema_decay=decay, decay="none"), source, run).sae))
    assert not torch.allclose(saved[0].W_enc, saved[1].W_enc)
    assert torch.allclose(saved[1].decoder_norms, torch.ones(16), atol=1e-6)


def test_default_learning_rate_falls_with_the_root_of_the_features() -> None:
    assert small(n_features=2**14).peak_lr == pytest.approx(1e-3)
    assert small(n_features=2**16).peak_lr == pytest.approx(5e-4)
    assert small(n_features=2**10).peak_lr == 2e-3
    assert small(lr=0.1).peak_lr == 0.1


def test_steps_count_whole_batches() -> None:
    assert small(rows=1_000, batch_size=64).steps(10) == 15
    assert small(rows=None, epochs=2.5, batch_size=64).steps(1_000) == 39
    assert small(rows=None, epochs=0.001, batch_size=64).steps(1_000) == 1


def test_rows_that_are_not_finite_stop_training_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    rows = Planted(12, 8, 2.0).rows(64 * 16)
    source = MemorySource(rows)
    order = source._order(0)
    rows[order[64 * 9 + 3], 2] = math.nan
    source.sample = lambda n: rows[order[:n]].clone()  # pyright: ignore[reportAttributeAccessIssue]
    with (
        Run.open(tmp_path / "run", "train", {}) as run,
        pytest.raises(UserError, match="1 of 64 rows in the batch of step 9: they hold NaN or infinity"),
    ):
        train(small(checkpoint_every=4, sample_rows=64), source, run)
    assert [path.name for path in checkpoint_files(tmp_path / "run" / "checkpoints")] == [
        "step-000000004.safetensors",
        "step-000000008.safetensors",
    ]
    assert not (tmp_path / "run" / "sae").exists()


def test_nan_in_the_sample_is_named(tmp_path: Path) -> None:
    rows = torch.full((100, 8), math.nan)
    with (
        Run.open(tmp_path / "run", "train", {}) as run,
        pytest.raises(UserError, match="100 of 100 rows in the sample"),
    ):
        train(small(), MemorySource(rows), run)


def test_zero_rows_cannot_be_scaled(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", "train", {}) as run, pytest.raises(UserError, match="all rows are zero"):
        train(small(), MemorySource(torch.zeros(100, 8)), run)


class Spiked(MemorySource):
    """Rows of which those of one step are so large that the loss overflows."""

    step: int | None = None

    def batches(self, batch_size: int, start_step: int = 0) -> Iterator[Tensor]:
        for step, batch in enumerate(super().batches(batch_size, start_step), start_step):
            yield batch * 1e30 if step == self.step else batch


@pytest.mark.parametrize(("spike", "good"), [(12, [5, 10]), (10, [5]), (5, []), (3, [])])
def test_a_diverging_training_keeps_only_checkpoints_from_which_a_step_was_taken(
    tmp_path: Path, spike: int, good: list[int]
) -> None:
    source, config = Spiked(Planted(12, 8, 2.0).rows(64 * 16)), small(checkpoint_every=5, scaling="none")
    ends = f"the last good checkpoint is step {good[-1]} in " if good else "there is no good checkpoint; "
    source.step = spike
    for _ in range(2):
        with (
            Run.open(tmp_path / "run", "train", {}) as run,
            pytest.raises(UserError, match=f"^loss inf at step {spike}: training diverged; {ends}.*lower --lr"),
        ):
            train(config, source, run)
        kept = [path.name for path in checkpoint_files(tmp_path / "run" / "checkpoints")]
        assert kept == [f"step-{step:09d}.safetensors" for step in good]
    source.step = None
    ended = []
    for name in ("run", "whole"):
        with Run.open(tmp_path / name, "train", {}) as run:
            ended.append(train(config, source, run).fingerprint)
    assert ended[0] == ended[1]


def test_a_checkpoint_of_blown_up_weights_is_not_kept(tmp_path: Path) -> None:
    source = MemorySource(Planted(12, 8, 2.0).rows(64 * 16))
    for _ in range(2):
        with (
            Run.open(tmp_path / "run", "train", {}) as run,
            pytest.raises(UserError, match="at step 1: training diverged; there is no good checkpoint"),
        ):
            train(small(lr=1e30, checkpoint_every=1, scaling="none", warmup_share=0.0), source, run)
        assert not checkpoint_files(tmp_path / "run" / "checkpoints")


def test_a_held_out_source_of_another_width_is_refused(tmp_path: Path) -> None:
    with (
        Run.open(tmp_path / "run", "train", {}) as run,
        pytest.raises(UserError, match="held-out rows of width 5: the training rows have width 8"),
    ):
        train(small(), MemorySource(torch.randn(100, 8)), run, heldout=MemorySource(torch.randn(100, 5)))


def test_resuming_with_rows_of_another_width_is_refused(tmp_path: Path) -> None:
    class Anonymous(MemorySource):
        @property
        def description(self) -> dict[str, object]:
            return {}

    with Run.open(tmp_path / "run", "train", {}) as run:
        train(small(), Anonymous(Planted(12, 8, 2.0).rows(100)), run)
    with (
        Run.open(tmp_path / "run", "train", {}) as run,
        pytest.raises(UserError, match=r"rows of width 6: the checkpoint in .* was trained on width 8"),
    ):
        train(small(), Anonymous(Planted(12, 6, 2.0).rows(100)), run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 16}, "k 16: it must be from 1 to n_features − 1 = 15"),
        ({"k": None, "l0": 16}, "l0 16: it must be from 1 to n_features − 1 = 15; choose a smaller l0"),
        ({"k": None, "l0": 16.5, "arch": "batchtopk"}, "l0 16.5: it must be from 1 to n_features − 1 = 15"),
        ({"k": None, "n_features": 0}, "n_features 0"),
        ({"l0": 3.0}, "k 2 and l0 3: they say the same thing twice; give one of them"),
        ({"k": None, "l0": 2.5}, "l0 2.5: topk keeps a whole number of features per row; round it"),
        ({"sparsity_weight": 0.1}, "sparsity_weight 0.1: architecture topk has no sparsity_weight; give l0 or k"),
        ({"threshold_momentum": 0.5}, "threshold_momentum 0.5: architecture topk has no threshold_momentum"),
        ({"n_features": 0}, "n_features 0"),
        ({"n_features": -1}, "n_features -1"),
        ({"batch_size": 0}, "batch_size 0: it must be positive"),
        ({"lr": math.nan}, "lr nan"),
        ({"rows": -5}, "rows -5"),
        ({"decay_share": 1.5}, "decay_share 1.5: it must be from 0 to 1"),
        ({"ema_decay": 1.0}, "ema_decay 1.0"),
        ({"clip_norm": -1.0}, "clip_norm -1.0"),
        ({"arch": "topkk"}, "arch 'topkk': it is one of .*topk.*; did you mean topk?"),
        ({"scaling": "big"}, "scaling 'big': it is one of sqrt_d, unit, none"),
        ({"k_start": 1}, "k_start 1: it must be from k = 2"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**settings)


def test_equal_trainings_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Run.open(tmp_path / name, "train", small()) as run:
            train(small(), MemorySource(Planted(12, 8, 2.0).rows(600)), run)
    first, second = (sorted((tmp_path / name / "sae").iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == ["cfg.json", "feature_stats.parquet", "sae_weights.safetensors"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
