"""The commands but for those of flags, policies and saved steerings, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trimtab.cli.flags import FLAG_COMMANDS
from trimtab.cli.job import Job, Printed
from trimtab.cli.policy import POLICY_COMMANDS
from trimtab.cli.steering import STEERING_COMMANDS


@dataclass(frozen=True, kw_only=True)
class ListConfig:
    """List the models of the catalogue."""


@dataclass(frozen=True, kw_only=True)
class PullConfig:
    """Fetch a model of the catalogue into the cache, so that no network is needed afterwards."""

    name: str
    """Name in the catalogue (`trimtab models list`)."""
    accept_terms: bool = False
    """Agree to the model's terms, where it has any."""
    again: bool = False
    """Fetch it anew, in place of what is cached."""
    path: Path | None = None
    """The model file, for a model that is converted from a local file."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Describe a model: sizes, sites, licence, chat template, shipped SAEs."""

    name: str
    """Catalogue name, directory, or hub id in the hub's local cache."""
    dtype: str = "float32"
    """What works is told in this precision."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html of a run from what the run holds."""

    run: Path
    """Directory of the run."""


def models_list() -> Job:
    """list the catalogue's models"""
    from trimtab.lm import list_models

    return Job(ListConfig, lambda _config: list_models())


def models_pull() -> Job:
    """fetch a model into the cache"""
    from trimtab.lm import pull

    def run(config: PullConfig) -> Printed:
        place = pull(config.name, path=config.path, accept_terms=config.accept_terms, again=config.again)
        return Printed({"name": config.name, "path": str(place)}, str(place))

    return Job(PullConfig, run, ("name",), "gemma-3-270m --accept-terms")


def models_show() -> Job:
    """describe a model"""
    from trimtab.dictionaries import shipped_names
    from trimtab.lm import show
    from trimtab.runs.tables import named_values

    def run(config: ShowConfig) -> Printed:
        details = show(config.name, config.dtype)
        saes = [name for name in shipped_names() if name.rpartition("/")[0] == config.name]
        text = f"{details.render()}\n{named_values({'shipped SAEs': ', '.join(saes) or 'none'})}"
        return Printed(details.to_json() | {"saes": saes}, text)

    return Job(ShowConfig, run, ("name",), "smollm2-135m-instruct")


def models_zoo() -> Job:
    """list what works on each type of model"""
    from trimtab.lm import Zoo, survey
    from trimtab.lm.zoo import ZooConfig
    from trimtab.runs import write_text

    def run(config: ZooConfig) -> Zoo:
        found = survey(config.type)
        if config.page is not None:
            write_text(config.page, found.markdown())
        return found

    return Job(ZooConfig, run, example="--type llama mamba")


def harvest() -> Job:
    """write a model's activations over text to disk"""
    from trimtab.activations import HarvestConfig, run_harvest
    from trimtab.runs import json_safe

    def run(config: HarvestConfig) -> Printed | None:
        result = run_harvest(config)
        if result is None:
            return None
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in result.dropped.items())
        rows = f"{result.train_rows:,} training and {result.holdout_rows:,} held-out rows"
        return Printed(json_safe(result._asdict()), f"{rows} in {result.directory}; left out: {dropped}")

    return Job(HarvestConfig, run, example="--text my_texts/ --site resid_post.10 resid_post.15 --run harvests/mine")


def train() -> Job:
    """train an SAE, or a bank of them, on a model's activations"""
    from trimtab.training import TrainCommand, command_defaults, run_train

    example = "--text my_texts/ --site resid_post.15 --arch topk --n-features 8192 --l0 32"
    return Job(TrainCommand, run_train, example=example, defaults=command_defaults)


def rank() -> Job:
    """rank an SAE's features by what amplifying them does"""
    from trimtab.selection import RankConfig, run_rank

    return Job(RankConfig, run_rank, example="--criterion delta-confidence output-score --limit 8")


def examples() -> Job:
    """collect windows of text in which each feature of an SAE fires"""
    from trimtab.features import ExamplesConfig, run_examples

    return Job(ExamplesConfig, run_examples, example="--sae runs/train-1234abcd/sae --text my_texts/")


def feature() -> Job:
    """show what a feature fires on, promotes and does, on one page"""
    from trimtab.features import FeatureConfig, FeatureProfiles, run_feature

    def pages(config: FeatureConfig, result: FeatureProfiles) -> list[Path]:
        return [Path(result.run), *([config.of] if config.of else [])]

    return Job(FeatureConfig, run_feature, ("feature",), "2112 --dose 0.2 0.4", pages=pages)


def find() -> Job:
    """find the features that bring a wish about, and prove it beside the usual alternatives"""
    from trimtab.finding import FindConfig, run_find

    example = '--want "the sea, ships and sailors" --budget KL=0.3 --run runs/sea'
    return Job(FindConfig, run_find, example=example, pages=lambda _, found: [found.run])


def steer() -> Job:
    """steer generation with features, or replay a steered run"""
    from trimtab.steering import ReplayReport, SteerConfig, SteerResult, run_steer
    from trimtab.steering.command import steer_defaults

    def run(config: SteerConfig) -> SteerResult | ReplayReport:
        from trimtab.finding.wish_score import wish_score
        from trimtab.flags.command import model_of_run

        return run_steer(config, load=model_of_run, scorer=wish_score)

    example = '"Yesterday I went to the" --feature 2112 --dose 0.4'
    return Job(SteerConfig, run, ("prompt",), example, defaults=steer_defaults)


def evaluate_core() -> Job:
    """measure how faithful an SAE is, and what it costs the model"""
    from trimtab.evaluation import CoreConfig, run_core

    return Job(CoreConfig, run_core, example="--sae runs/train-1234abcd/sae --text held_out.jsonl")


def evaluate_wishes() -> Job:
    """compare ways of control over the wishes of several finished searches"""
    from trimtab.finding.comparison import WishesConfig, run_wishes

    return Job(WishesConfig, run_wishes, ("runs",), "runs/sea runs/formal", pages=lambda _, found: [found.run])


def autointerp() -> Job:
    """measure how well a judge tells where an SAE's features fire"""
    from trimtab.interpreting import AutointerpConfig, run_autointerp

    example = "--sae runs/train-1234abcd/sae --judge exemplar --features 200"
    return Job(AutointerpConfig, run_autointerp, example=example, pages=lambda _, found: [found.run])


def evaluate_judge() -> Job:
    """measure how often a judge of features is right on labelled texts"""
    from trimtab.interpreting import CalibrationConfig, run_calibration

    example = "--labelled axbench/ --judge exemplar --run runs/judge"
    return Job(CalibrationConfig, run_calibration, example=example, pages=lambda _, found: [found.run])


def evaluate_axbench() -> Job:
    """score how well steering by features, vectors, prompts or flags brings concepts about, read by a judge"""
    from trimtab.interpreting.axbench import AxBenchConfig, AxBenchResult, run_axbench

    def run(config: AxBenchConfig) -> AxBenchResult:
        from trimtab.flags.axbench_arm import load_flag_arm

        return run_axbench(config, load_flag_arm)

    return Job(AxBenchConfig, run, example="--n-features 8 --factor 0.5 1 2 --run runs/axbench")


def evaluate_ground_truth() -> Job:
    """rank SAE architectures on data whose features are known"""
    from trimtab.evaluation import GroundTruthConfig, run_ground_truth

    return Job(GroundTruthConfig, run_ground_truth, example="--arch topk jumprelu --data-sets 3 --run runs/known")


def evaluate_circuit() -> Job:
    """find the heads by which a model solves IOI, and measure how much of the answer they bring about"""
    from trimtab.evaluation.circuits.command import CircuitConfig, show_circuit

    return Job(CircuitConfig, show_circuit, example="--model smollm2-135m-instruct --run runs/circuit")


def evaluate_ioi() -> Job:
    """hold SAEs of a task against supervised codes, at the cross-sections of its circuit"""
    from trimtab.evaluation.supervised.command import IOIConfig, run_ioi

    return Job(IOIConfig, run_ioi, example="--circuit runs/circuit/circuit.json --run runs/ioi")


def study_utility() -> Job:
    """ask whether SAEs that a judge understands better also steer better, and which criteria find features that do"""
    from trimtab.studies.utility.command import UtilityStudyConfig, run_utility_study

    example = "recipes/utility-small.toml --run runs/utility"
    return Job(UtilityStudyConfig, run_utility_study, ("study",), example, pages=lambda _, study: [Path(study.run)])


def study_ioi() -> Job:
    """find a model's IOI circuit and hold dictionaries of every kind against supervised codes there, with a report"""
    from trimtab.studies.ioi import IOIStudyConfig, run_ioi_study

    return Job(
        IOIStudyConfig, run_ioi_study, example="--preset quick --run runs/study-ioi",
        pages=lambda _, study: [Path(study.run)],
    )  # fmt: skip


def sae_info() -> Job:
    """describe an SAE, whoever trained it"""
    from trimtab.dictionaries.describing import SAEInfoConfig, describe_sae

    return Job(SAEInfoConfig, describe_sae, ("sae",), "smollm2-135m-instruct/resid_post.15")


def sae_stats() -> Job:
    """measure how strongly and how often an SAE's features fire on a text"""
    from trimtab.evaluation import SAEStatsConfig, measure_stats

    return Job(SAEStatsConfig, measure_stats, ("sae",), "downloads/their-sae --text my_texts/")


def sae_convert() -> Job:
    """save an SAE of another library in trimtab's and SAELens's layout"""
    from trimtab.dictionaries.converting import ConvertConfig, convert_sae

    example = "downloads/their-sae my-sae --model gpt2 --site resid_pre.8"
    return Job(ConvertConfig, convert_sae, ("source", "destination"), example)


def report() -> Job:
    """write the HTML page of a run: of train, rank, steer, evaluate, study, flags, policies or the demo"""
    from trimtab.report import write_report

    def run(config: ReportConfig) -> Printed:
        page = write_report(config.run)
        return Printed({"report": str(page)}, str(page))

    return Job(ReportConfig, run, ("run",), "runs/demo")


def demo() -> Job:
    """find what brings three wishes about in the default model, prove it, train a small policy, with reports"""
    from trimtab.studies import DemoConfig, DemoResult, run_demo

    def pages(config: DemoConfig, result: DemoResult) -> list[Path]:
        parts = [*(f"wish-{number}" for number in range(1, len(result.wishes) + 1)), *["policy"] * bool(result.policy)]
        return [config.run, *(config.run / part for part in parts)]

    return Job(DemoConfig, run_demo, example="--no-policy", pages=pages)


COMMANDS: dict[str, Callable[[], Job]] = {
    "demo": demo,
    "models list": models_list,
    "models pull": models_pull,
    "models show": models_show,
    "models zoo": models_zoo,
    "harvest": harvest,
    "train": train,
    "rank": rank,
    "examples": examples,
    "feature": feature,
    "autointerp": autointerp,
    "find": find,
    "steer": steer,
    **STEERING_COMMANDS,
    "evaluate core": evaluate_core,
    "evaluate wishes": evaluate_wishes,
    "evaluate judge": evaluate_judge,
    "evaluate axbench": evaluate_axbench,
    "evaluate ground-truth": evaluate_ground_truth,
    "evaluate circuit": evaluate_circuit,
    "evaluate ioi": evaluate_ioi,
    "study ioi": study_ioi,
    "study utility": study_utility,
    "sae info": sae_info,
    "sae stats": sae_stats,
    "sae convert": sae_convert,
    "report": report,
    **FLAG_COMMANDS,
    **POLICY_COMMANDS,
}
