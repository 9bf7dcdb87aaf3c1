"""The report of a policy: how it was trained, what it gains over its controls, and where its choices mattered.

Made from a run directory and nothing else; what is not there yet is a line that names the command which makes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from trimtab.report.page import Html, Page, callout, details, facts
from trimtab.report.policy_analysis import branch_section, critic_section, layer_section, ledger_section
from trimtab.report.policy_arms import above, evaluation_section
from trimtab.report.policy_files import PolicyFiles
from trimtab.report.policy_numbers import notes, sentence
from trimtab.report.policy_tokens import token_section
from trimtab.report.policy_training import headroom_section, training_section
from trimtab.runs import write_text
from trimtab.stats import Interval

REPORT_NAME = "report.html"


def write_policy_report(run_dir: Path) -> Path:
    """Write `report.html` into the directory of a run of `policy train` (or of `policy evaluate --out`).

    Prompts and answers of tasks with harmful texts are left out: features and positions stand in their place.

    Returns:
        The file.

    Raises:
        UserError: no policy's run is there, one of its files is damaged, or the disk refuses.
    """
    path = run_dir / REPORT_NAME
    write_text(path, policy_page(PolicyFiles.read(run_dir)).render())
    return path


def policy_page(files: PolicyFiles) -> Page:
    """The page, from what a run directory holds."""
    record = files.record
    config = record["config"]
    lead = [
        f"run {files.path.name}",
        f"trimtab {record['versions'].get('trimtab', '')}",
        str(record.get("updated", ""))[:10],
    ]
    if "model" in config:
        lead.insert(0, f"{config['model']}, dose {config['dose']:g} {config['unit']}, mask {config['mask']}")
    page = Page(f"What does a policy gain on {files.task or 'its task'}?", "; ".join(part for part in lead if part))
    page.add(_answer(files))
    page.section("The policy between the lines", *headroom_section(files))
    page.section("Beside its controls", *evaluation_section(files))
    page.section("Token by token", *token_section(files))
    page.section("Branch points", *branch_section(files))
    page.section("What the critic knows", *critic_section(files))
    page.section("Layers and kinds of features", *layer_section(files))
    page.section("Features used", *ledger_section(files))
    page.section("Training", *training_section(files))
    page.section("How it was run", *_method(files))
    return page


def _answer(files: PolicyFiles) -> Html:
    found, results = files.evaluation, _results(files)
    if found is None:
        if "best_validation_reward" not in results:
            return callout("Not finished: the training goes on with the same command.", good=False)
        best, unsteered = results["best_validation_reward"], results["unsteered_validation_reward"]
        return callout(
            f"Validation reward {best:.3f} at iteration {results['best_iteration']}, which was chosen there; unsteered "
            f"{unsteered:.3f}. Not evaluated on other items yet.",
            good=False,
        )
    result: dict[str, Any] = found["result"]
    own = next(arm for arm in result["arms"] if arm["name"] == "policy")
    clear, others = above(result)
    gain = Interval.from_dict(result["gain"]["total"])
    reward = Interval.from_dict(own["reward"])
    said = (
        f"{'Yes' if gain.low > 0 else 'Not shown'}: on {result['items']:,} items ({result['split']}) its reward is "
        f"{reward:.3f}, {sentence(result['gain']['total'])} over the "
        f"unsteered model."
    )
    if clear or others:
        said += f" It is clearly above {len(clear)} of {len(clear) + len(others)} arms"
        said += "." if not others else f", not above: {', '.join(others)}."
    return callout(said, good=gain.low > 0 and not others)


def _results(files: PolicyFiles) -> dict[str, Any]:
    found: Any = files.record["results"]
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _method(files: PolicyFiles) -> list[Html]:
    record, config = files.record, files.record["config"]
    results = _results(files)
    splits = ", ".join(f"{len(ids):,} {name}" for name, ids in record["splits"].items())
    openings = ", ".join(f"{o['split']} at {o['time']}" for o in record["test_split_openings"])
    pairs = [
        ("Run", str(files.path)),
        ("Status", str(record["status"])),
        ("Model", str(config.get("model", "–"))),
        ("SAE", str(config.get("sae", "–"))),
        ("Seeds", ", ".join(str(seed) for seed in record.get("seeds", []))),
        ("Items", splits),
        ("Openings of splits that chose nothing", openings or "none"),
        ("Hashes", ", ".join(f"{name} {value}" for name, value in record["hashes"].items())),
        ("Device", str(record.get("device", ""))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    if "rollouts" in results:
        pairs.insert(2, ("Rollouts", f"{results['rollouts']:,} in {results['iterations']} iterations"))
        pairs.insert(3, ("Best checkpoint", f"iteration {results['best_iteration']}, chosen on validation"))
    warnings = [str(warning) for warning in results.get("warnings", [])]
    whole = details("Config", facts(_flat(config)))
    return [facts(pairs), *notes("Warnings", warnings), whole]


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            pairs.append((f"{prefix}{name}", str(value)))
    return pairs
