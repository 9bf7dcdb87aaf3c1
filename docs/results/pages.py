"""The numbers on the result pages: cut from finished runs into `data/`, and drawn from there as tables and a figure.

    python docs/results/pages.py --runs runs   # data/*.json, then tables and figure
    python docs/results/pages.py               # tables and figure from data/*.json

A table stands below the comment that names it and its files: `<!-- arms data/ioi-fresh.json -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.runs import read_record
from trimtab.runs.figures import ROW, Mark, MarkedLine, plot_intervals, plot_lines, svg
from trimtab.runs.shown import SHOWN_FILE
from trimtab.runs.tables import COUNT, INTERVAL, NUMBER, SIGNED, Column, markdown_table
from trimtab.stats import Interval, interval_of, number_text

HERE = Path(__file__).parent
DATA, IMAGES = HERE / "data", HERE.parent / "images"
FIGURE, DEMO_FIGURE = IMAGES / "ioi-fresh.svg", IMAGES / "demo-price.svg"
PAGES = [HERE.parent / "results.md", *sorted(HERE.glob("*.md")), HERE.parents[1] / "README.md"]
MARKER = re.compile(r"<!-- (\w+) ((?:data/[\w-]+\.json ?)+)-->\n(?:\|.*\n)*")

TRAIN = """trimtab policy train --task ioi-mixture --dose 1.0 --mask accumulated --head decoder --train-items 192
--validation-items 96 --iterations 60 --items-per-iteration 32 --samples 16 --batch-size 256 --ppo.clip 0.3
--ppo.entropy-bonus 0.05 --headroom-items 0 --seed 0 --run runs/mixture-0"""
BBQ_TRAIN = """trimtab policy train --task bbq-ambiguous --data DIR --options-only --dose 0.5 --mask accumulated
--head decoder --train-items 256 --validation-items 96 --iterations 80 --items-per-iteration 16 --samples 16
--batch-size 256 --ppo.clip 0.3 --ppo.entropy-bonus 0.05 --headroom-items 0 --seed 0 --run runs/bbq-0"""
LAYER_22, LAYER_15 = (" ".join(f"runs/{name}-{seed}" for seed in range(3)) for name in ("mixture22", "mixture"))
BBQ = "runs/bbq-0 runs/bbq-1 runs/bbq-2"
PARTS = "--part critic ledger branch-points --items 96 --headroom-items"
WIDE = "--items 200 --kl-items 32 --vector-steps 60 --lora-steps 60 --train-items 192 --no-trace --run runs/"

INTERVALS = "estimate low high n"
ARMS = """result companions task split items arms label reward by_seed difference difference_by_run difference_over_runs
malformed kl equal_kl equal_dose dose relative n_edits metrics accuracy/same accuracy/other gain total over_runs format
answer settings_compared site seeds validation_reward missing"""
CRITIC = """counts correct corrected misguided incorrect separations group step n n_right critic probe verdicts label
helped share random"""
SHOWN = "title tables columns form rows"
CROSS_SECTIONS = {
    name: "" for name in ("name-mover outputs", "direct outputs", "S-inhibition outputs", "S-inhibition values")
}
"""Those that pages show, all rows of them."""
FEATURES = {
    "shares": r"IO(, S1| − S1), all, ", "sweep": "", "sparsities": "", "on test prompts": "",
    "features of Pos": 10, "F1 of unions": 10,
}  # fmt: skip
"""Tables of what features are: how many rows pages show, or what the words of a row begin with that they show."""
CODES = "supervised, mse"
CONTROL = {"Ways of control": "", "Effect and divergence": ""}
"""Tables of what flags and other ways bring about, and which rows."""
CURRICULA = " ".join(f"runs/{name}-{seed}" for name in ("forced", "auxiliary", "plain") for seed in range(3))
WAYS = "unsteered found random activation-difference delta-confidence mean-difference prompting"
WISHES = """runs/anger runs/british runs/business runs/code runs/fear runs/formal runs/joy runs/love runs/science
runs/sports runs/surprise runs/world_news""".replace("\n", " ")
LATER_WISHES = "runs/past_tense runs/positive runs/question runs/sadness"
GEMMA_WISHES = " ".join(f"runs/gemma-{name}" for name in ("business", "code", "formal", "joy", "past_tense", "sports"))
LEDGER = "entries feature uses items reward_difference decisions no_edit"


STUDIED = (("smollm2", "ioi", ""), ("gemma3", "ioi-gemma", " --model gemma-3-270m"))
"""Names of files and runs, and options, of the models whose IOI circuits are studied."""


class Source(NamedTuple):
    """What a file of `data/` is cut from."""

    run: str
    """Directory of the run, whose record has versions and seeds."""
    file: str
    """Results in it."""
    keep: str
    """Names of the fields that pages show, at any depth."""
    command: str
    record: str = ""
    """Run whose record has versions, where this one has none of its own."""
    tables: Mapping[str, str | int] = {}
    """Of what a run's page shows: titles, and which rows."""


SOURCES = {
    "ioi-fresh": Source(
        "fresh", "evaluation.json", ARMS,
        f"trimtab policy evaluate {LAYER_22} {LAYER_15} --skip 200 --items 400 --control random random-allowed static "
        "gated vector --no-equal-kl --vector-steps 60 --train-items 192 --no-trace --run runs/fresh",
    ),
    "ioi-one-feature": Source(
        "one-feature", "evaluation.json", ARMS,
        f"trimtab policy evaluate {LAYER_22} --skip 200 --items 400 --control static gated --used 1 --n-random 0 "
        "--no-equal-kl --train-items 192 --no-trace --run runs/one-feature",
    ),
    "ioi-layer-22": Source("layer22", "evaluation.json", ARMS, f"trimtab policy evaluate {LAYER_22} {WIDE}layer22"),
    "ioi-layer-15": Source("layer15", "evaluation.json", ARMS, f"trimtab policy evaluate {LAYER_15} {WIDE}layer15"),
    "ioi-found": Source(
        "found", "evaluation.json", ARMS,
        "trimtab policy evaluate runs/found-10 runs/found-11 runs/found-12 --items 200 --control random --no-equal-kl "
        "--train-items 192 --no-trace --run runs/found",
    ),
    "bbq-found": Source(
        "bbq-found", "evaluation.json", f"{ARMS} metric_intervals bias_score",
        "trimtab policy evaluate runs/bbq-10 runs/bbq-11 runs/bbq-12 --items 200 --control random --no-equal-kl "
        "--train-items 256 --no-trace --run runs/bbq-found",
    ),
    "ioi-headroom": Source(
        "headroom", "headroom.json",
        "task split lines mask allowed_per_item items of_features unsteered ceiling random_ceiling static most_active "
        "readout over_static", "trimtab policy headroom --task ioi-mixture --items 12 --dose 1.0 --run runs/headroom",
        "fresh",
    ),
    "ioi-doses": Source(
        "layers-analysis", "analysis.json",
        "task layers site unit trained_dose unsteered doses dose reward difference kl malformed tolerated "
        "chosen_features kinds factor chosen by_use live rows",
        "trimtab policy analyze runs/mixture22-0 runs/mixture-0 runs/mixture7 --part layers",
        "mixture22-0",
    ),
    "ioi-inside-22": Source(
        "mixture22-0", "analysis/analysis.json",
        f"task split items site critic ledger branch_points tokens branch_point excess {CRITIC} {LEDGER}",
        f"trimtab policy analyze runs/mixture22-0 {PARTS} 16",
    ),
    "ioi-inside-15": Source(
        "mixture-0", "analysis/analysis.json",
        f"task split items site critic ledger branch_points tokens branch_point excess {CRITIC} {LEDGER}",
        f"trimtab policy analyze runs/mixture-0 {PARTS} 8",
    ),
    "bbq": Source(
        "bbq", "evaluation.json", f"{ARMS} metric_intervals bias_score",
        f"trimtab policy evaluate {BBQ} --items 200 --control random most-active static gated shuffled vector "
        "prompting letters --no-equal-kl --draws 1 --vector-steps 30 --train-items 128 --finalists 6 --used 12 "
        "--n-random 24 --no-trace --run runs/bbq",
    ),
    "demo": Source(
        "demo", "run.json",
        f"wishes title yes unit words ways name label own equal_kl effect kl best random marks threshold shares {WAYS} "
        "texts prompt way adds policy task items arms reward difference seconds",
        "trimtab demo",
    ),
    **{
        f"supervised-{name}": Source(
            f"study-{model}/contenders", SHOWN_FILE, SHOWN, f"trimtab study ioi{option} --run runs/study-{model}",
            tables=CROSS_SECTIONS,
        )
        for name, model, option in STUDIED
    },
    **{
        f"features-{name}": Source(
            f"study-{model}", SHOWN_FILE, SHOWN, f"trimtab study ioi{option} --run runs/study-{model}", tables=FEATURES
        )
        for name, model, option in STUDIED
    },
    **{
        f"codes-{name}": Source(
            f"codes-{model}", "run.json", "scores cross_section contender approximation sufficiency edits attribute "
            "result success counted effect",
            f"trimtab evaluate ioi{option} --circuit runs/study-{model}/circuit --contender codes --k 2 --n-test 96 "
            f"--n-heldout 64 --run runs/codes-{model}",
        )
        for name, model, option in STUDIED
    },
    "flags-adapter": Source(
        "flags-adapter", SHOWN_FILE, f"{SHOWN} difference",
        "trimtab flags evaluate runs/adapter-0 runs/adapter-plain --part control price --snapshots 1 --compared 2 "
        "--sae default --judge-data data/flags/judge.npz --run runs/flags-adapter",
        tables={"price": "", "Flags on, off and free": "", **CONTROL},
    ),
    "find-wishes": Source(
        "wishes", SHOWN_FILE, SHOWN, f"trimtab evaluate wishes {WISHES} --run runs/wishes",
        tables={"ways over wishes": "", "each wish": ""},
    ),
    "find-wishes-later": Source(
        "wishes-later", SHOWN_FILE, SHOWN, f"trimtab evaluate wishes {LATER_WISHES} --run runs/wishes-later",
        tables={"ways over wishes": "", "each wish": ""},
    ),
    "find-wishes-gemma": Source(
        "wishes-gemma", SHOWN_FILE, SHOWN, f"trimtab evaluate wishes {GEMMA_WISHES} --run runs/wishes-gemma",
        tables={"ways over wishes": "", "each wish": ""},
    ),
    "find-gemma-sae": Source(
        "gemma-train", "run.json", "explained_variance l0 dead_share",
        "trimtab train --model gemma-3-270m --activations runs/gemma-rows --site resid_post.9 --arch batchtopk "
        "--n-features 4096 --k 40 --batch-size 2048 --epochs 4 --lr 1.2e-3 --decay-share 0.4 --heldout-rows 22368 "
        "--run runs/gemma-train",
    ),
    "utility": Source(
        "utility", SHOWN_FILE, SHOWN, "trimtab study utility recipes/utility-one-model.toml --run runs/utility",
        tables={
            **dict.fromkeys(("scores", "SAEs", "lifts", "pairs", "agreement", "halves", "gain"), ""),
            **dict.fromkeys(("groups", "given", "shuffled judge"), ".*before selection"),
        },
    ),
    "flags-self": Source(
        "flags-self", SHOWN_FILE, f"{SHOWN} difference",
        "trimtab flags evaluate runs/self-0 --part control price --snapshots 1 --compared 0 --data LABELLED "
        "--judge-data JUDGED --run runs/flags-self",
        tables={"price": "", "Flags on, off and free": ""},
    ),
    "flags-curricula": Source(
        "flags-curricula", SHOWN_FILE, SHOWN,
        f"trimtab flags evaluate {CURRICULA} --snapshots 1 --compared 0 --judge-data data/flags/judge.npz "
        "--run runs/flags-curricula",
        tables={
            "price": "", "reading": ".*response", "erosion": ".*response, linear, without flags$", "effects": ".*held",
            "reliance": ".*(zeroed|swapped)", "Control of all runs": "",
        },
    ),
    "flags-price": Source(
        "flags-price", SHOWN_FILE, SHOWN,
        "trimtab flags evaluate runs/adapter-0 --part price --snapshots 1 --task none --text "
        "text/wikitext2_test.txt --text-tokens 20480 --run runs/flags-price",
        tables={"price": ""},
    ),
    "flags-reliance": Source(
        "flags-reliance", SHOWN_FILE, SHOWN,
        "trimtab flags evaluate runs/forced-0 runs/auxiliary-0 runs/plain-0 --part reliance --fit-items 48 --items 24 "
        "--snapshots 5 --run runs/flags-reliance",
        tables={"reliance": ".*swapped", "growth": ".*(zeroed|swapped)"},
    ),
    "core": Source(
        "core", "run.json",
        "documents tokens metrics name value",
        "trimtab evaluate core",
    ),
}  # fmt: skip
TRAININGS = {
    "ioi-trainings": ("mixture22-? mixture-? mixture7", TRAIN),
    "bbq-trainings": ("bbq-?", BBQ_TRAIN),
}
"""Runs of each file, and how the first was made."""


def kept(value: Any, names: set[str]) -> Any:
    """What is left of plain values with fields of these names alone."""
    if isinstance(value, list):
        return [kept(one, names) for one in value]
    if not isinstance(value, dict):
        return value
    wanted = set(INTERVALS.split()) if "estimate" in value else names
    return {name: kept(one, names) for name, one in value.items() if name in wanted}


def first_texts(wish: dict[str, Any]) -> dict[str, Any]:
    """A wish of the demo with the texts behind the first prompt alone."""
    marks = wish["marks"]
    texts = [text for text in marks["texts"] if text["prompt"] == marks["texts"][0]["prompt"]]
    rounded = [{**text, "adds": [round(value, 2) for value in text["adds"]]} for text in texts]
    return {**wish, "marks": {**marks, "texts": rounded}}


def training(record: dict[str, Any]) -> dict[str, Any]:
    """A finished training in a few numbers."""
    config, found = record["config"], record["results"]
    site = re.search(r"resid_post\.\d+", f"{config['sae']} {config['site']}")
    return {"site": site[0] if site else "resid_post.15", "head": config["head"], "mask": config["mask"],
            "seed": config["seed"], "unsteered": found["unsteered_validation_reward"],
            "best": found["best_validation_reward"], "iteration": found["best_iteration"],
            "rollouts": found["rollouts"], "seconds": found["seconds"]}  # fmt: skip


def collect(runs: Path) -> None:
    """Write the data of all runs that have finished."""
    for name, source in SOURCES.items():
        file = runs / source.run / source.file
        if file.exists():
            record = read_record(runs / (source.record or source.run))
            found = json.loads(file.read_text(encoding="utf-8"))
            found = found["results"] if file.name == "run.json" else found
            found = {"tables": few_tables(found, source.tables)} if file.name == SHOWN_FILE else found
            if controls := (record["results"] or {}).get("controls"):
                found["difference"] = controls[0]["control"]["difference"]
            if found is not None and "wishes" in found:
                found = {**found, "wishes": [first_texts(wish) for wish in found["wishes"]]}
            if found is not None and "scores" in found:
                found = {"scores": [score for score in found["scores"] if score["contender"] == CODES]}
            if found is not None:
                seeds = found.get("seeds", record["seeds"])
                write(name, source.command, record, seeds, kept(found, set(source.keep.split())))
    for name, (patterns, command) in TRAININGS.items():
        found = [
            read_record(f.parent) for pattern in patterns.split() for f in sorted(runs.glob(f"{pattern}/run.json"))
        ]
        if done := [record for record in found if record["results"]]:
            rows = [training(record) for record in done]
            write(name, command, done[0], sorted({row["seed"] for row in rows}), {"trainings": rows})


def write(name: str, command: str, record: dict[str, Any], seeds: Sequence[int], found: dict[str, Any]) -> None:
    """One file of `data/`."""
    about = {"command": " ".join(command.split()), "versions": record["versions"], "date": record["updated"][:10]}
    text = json.dumps(about | {"seeds": list(seeds)} | found, ensure_ascii=False, allow_nan=False)
    rows = re.sub(r', (?=\{"(?:label|mask|site|feature|group|dose|factor)")', ",\n  ", text)
    (DATA / f"{name}.json").write_text(rows + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """One file of `data/`."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def over_trainings(arm: Any) -> str | None:
    found = interval_of(arm["difference_over_runs"])
    return None if found is None else found.bounds(SIGNED)


def divergence(arm: Any) -> str:
    return number_text(arm["kl"], ".2f") + " ≠" * (arm["equal_kl"] is False)


def dose(arm: Any) -> str | None:
    if arm["dose"] is None:
        return None
    text = number_text(arm["dose"]["relative"], NUMBER) + " ≠" * (arm["equal_dose"] is False)
    return f"{text}, {arm['dose']['n_edits']:,}"


ARM_COLUMNS = [
    Column("arm", "label"),
    Column("reward", "reward", INTERVAL),
    Column("policy − arm", "difference", SIGNED),
    Column("over trainings", over_trainings, SIGNED),
    Column("malformed", "malformed.estimate", ".2f"),
    Column("KL, nats", divergence, ".2f"),
    Column("‖Δ‖/‖x‖, edits", dose, NUMBER),
]


def arms(found: Any) -> str:
    """Every arm beside the policy."""
    return markdown_table(ARM_COLUMNS, found["result"]["arms"])


TITLES = {
    "ioi-fresh": "[IOI, fresh items](results/ioi.md)",
    "ioi-one-feature": "[IOI, fresh items, one feature](results/ioi.md#one-feature)",
    "ioi-layer-22": "[IOI, layer 22](results/ioi.md#layer-22-beside-all-controls)",
    "ioi-layer-15": "[IOI, layer 15](results/ioi.md#layer-15-beside-all-controls)",
    "bbq": "[BBQ, ambiguous](results/bbq.md)",
}


def summary(*names: str) -> str:
    """One row for each evaluation: the policy's gain, and the control that earns most there."""
    columns = [
        Column("policies on", "title"),
        Column("items", "items", COUNT),
        Column("unsteered", "unsteered.reward", INTERVAL),
        Column("policy", "policy.reward", INTERVAL),
        Column("gain", "unsteered.difference", SIGNED),
        Column("over trainings", lambda row: over_trainings(row["unsteered"]), SIGNED),
        Column("best control", "best.label"),
        Column("policy − it", "best.difference", SIGNED),
    ]
    rows: list[dict[str, Any]] = []
    for name in names:
        result = read(name)["result"]
        by_label = {arm["label"]: arm for arm in result["arms"]}
        controls = [arm for label, arm in by_label.items() if label not in ("unsteered", "policy")]
        best = max(controls, key=lambda arm: arm["reward"]["estimate"])
        rows.append({"title": TITLES[name], "items": result["items"], "best": best} | by_label)
    return markdown_table(columns, rows)


def trainings(found: Any) -> str:
    """What each training came to on validation."""
    columns = [
        Column("layer", layer_number, COUNT),
        Column("seed", "seed", COUNT),
        Column("unsteered", "unsteered", INTERVAL),
        Column("best checkpoint", "best", INTERVAL),
        Column("iteration", "iteration", COUNT),
        Column("seconds", "seconds", ",.0f"),
    ]
    return markdown_table(columns, found["trainings"])


def headroom(found: Any) -> str:
    """What one edit could earn under each mask."""
    columns = [
        Column("mask (features it allows)", lambda line: f"{line['mask']} ({line['allowed_per_item']:,.0f})"),
        *(
            Column(title, name, ".2f")
            for title, name in (
                ("unsteered", "unsteered"), ("ceiling", "ceiling"), ("random directions", "random_ceiling"),
                ("best static feature", "static"), ("most active", "most_active"), ("readout", "readout"),
            )
        ),
    ]  # fmt: skip
    return markdown_table(columns, found["lines"])


def doses(found: Any) -> str:
    """Reward by dose, a row for each layer."""

    def at(factor: float, name: str, layer: Any) -> Interval | None:
        return interval_of(next(p[name] for p in layer["doses"] if p["dose"] == factor * layer["trained_dose"]))

    columns = [
        Column("layer", layer_number, COUNT),
        *(Column(f"{factor:g} × the dose", partial(at, factor, "reward"), INTERVAL) for factor in (0.5, 1, 2, 4)),
        Column("KL at the dose, nats", partial(at, 1, "kl"), ".2f"),
    ]
    return markdown_table(columns, found["layers"])


def layer_number(row: Any) -> str:
    return row["site"].rpartition(".")[2]


def companion(found: Any) -> str:
    """Every arm on the first of the tasks that must stand beside this one."""
    return markdown_table(ARM_COLUMNS, found["companions"][0]["arms"])


def edits_of_codes(found: Any) -> str:
    """Every cross-section and attribute whose true patch moves the logit difference or enough answers."""
    columns = [
        Column("cross-section", "cross_section"), Column("sufficient", "approximation.sufficiency", INTERVAL),
        Column("attribute", "attribute"), Column("answers changed", "result.counted", COUNT),
        Column("success", "result.success", INTERVAL), Column("effect", "result.effect", INTERVAL),
    ]  # fmt: skip
    rows = [{**score, **edit} for score in found["scores"] for edit in score["edits"] if edit["result"]["effect"]]
    return markdown_table(columns, rows)


def wishes(found: Any) -> str:
    """What the demo came to for each wish."""
    rows: list[dict[str, Any]] = []
    for wish in found["wishes"]:
        by_name = {way["name"]: way for way in wish["ways"]}
        other = by_name[wish["best"]]
        rows.append({**wish, "found": by_name["found"], "other": other["equal_kl"] or other["own"]})
    columns = [
        Column("wish", "title"),
        Column("shown", lambda row: "yes" if row["yes"] else "no"),
        Column("found", "found.label"),
        Column("effect", "found.own.effect", "+.2f"),
        Column("KL, nats", "found.own.kl", ".2f"),
        Column("random features", "random", "+.2f"),
        Column("best alternative", "best"),
        Column("its effect", "other.effect", "+.2f"),
        Column("its KL", "other.kl", ".2f"),
    ]
    return markdown_table(columns, rows)


def before_after(found: Any) -> str:
    """The first text of the demo without steering, and with what was found for each wish; marked words are bold."""

    def text(wish: Any, way: str) -> str:
        one = next(text for text in wish["marks"]["texts"] if text["way"] == way)
        plain = [re.sub(r"([|*_<>`\[\]\\])", r"\\\1", word.strip()) for word in one["words"]]
        bold = [value > 0 and way == "found" for value in one["adds"]]
        return " ".join(f"**{word}**" if strong else word for word, strong in zip(plain, bold, strict=True))

    first = found["wishes"][0]
    rows = [{"steered": "not steered", "text": text(first, "unsteered")}]
    rows += [{"steered": f"**{wish['title']}**", "text": text(wish, "found")} for wish in found["wishes"]]
    prompt = first["marks"]["texts"][0]["prompt"]
    return markdown_table([Column("wish", "steered"), Column(f"{prompt} …", "text")], rows)


ONE_FILE = {
    one.__name__: one for one in (arms, trainings, headroom, doses, companion, edits_of_codes, wishes, before_after)
}


def few_tables(sections: Any, wanted: Mapping[str, str | int]) -> list[Any]:
    """The tables that pages show, their numbers rounded."""

    def rounded(cell: Any) -> Any:
        if isinstance(cell, dict):
            return {name: rounded(one) for name, one in cell.items()}
        return round(cell, 4) if isinstance(cell, float) else cell

    def rows_of(table: Any) -> list[list[Any]]:
        rows, which = table["rows"], wanted[table["title"]]
        if isinstance(which, int):
            return rows[:which]
        return [row for row in rows if re.match(which, ", ".join(cell for cell in row if isinstance(cell, str)))]

    tables = [table for section in sections for table in section["tables"] if table["title"] in wanted]
    return [{**table, "rows": [[rounded(cell) for cell in row] for row in rows_of(table)]} for table in tables]


def at_place(place: int, row: Any) -> Any:
    return row[place]


def shown(kind: str, found: Any) -> str:
    """A table that the run's own page shows, by its title with underscores."""
    table = {re.sub(r"\W+", "_", t["title"]): t for t in found["tables"]}[kind]
    forms = [INTERVAL if c["form"] == ".2f" else c["form"] for c in table["columns"]]
    columns = [Column(c["title"], partial(at_place, i), forms[i]) for i, c in enumerate(table["columns"])]
    return markdown_table(columns, table["rows"])


def drawn(page: str) -> str:
    """A page with its tables drawn from `data/`."""

    def table(match: re.Match[str]) -> str:
        kind, names = match[1], [Path(file).stem for file in match[2].split()]
        text = summary(*names) if kind == "summary" else one_file(kind, read(*names))
        return f"<!-- {kind} {match[2].strip()} -->\n{text}\n"

    return MARKER.sub(table, page)


def one_file(kind: str, found: Any) -> str:
    """A table of this module, or one that the run's own page shows."""
    return ONE_FILE[kind](found) if kind in ONE_FILE else shown(kind, found)


def figure() -> str:
    """The policy beside each control on the fresh items, as SVG."""
    rows = [arm for arm in read("ioi-fresh")["result"]["arms"] if arm["difference_over_runs"]]
    marks = [
        Mark(arm["label"], interval_of(arm["difference_over_runs"]), points=arm["difference_by_run"]) for arm in rows
    ]

    def draw(ax: Any) -> None:
        plot_intervals(ax, marks, "reward of the policy minus the arm's, 95% intervals over items and trainings")

    return on_white(
        svg(draw, "The policy beside its controls on fresh items of two-context IOI", height=ROW * len(marks) + 0.8)
    )


def demo_figure() -> str:
    """Effect against price for the demo's first wish, as SVG."""
    wish = read("demo")["wishes"][0]
    lines: list[MarkedLine] = []
    for way in wish["ways"]:
        measured = way["equal_kl"] or way["own"]
        place = measured["kl"]["estimate"], measured["effect"]["estimate"]
        lines.append(MarkedLine(way["name"], [(0.0, 0.0), place], place, way["name"] == "found"))

    def draw(ax: Any) -> None:
        plot_lines(ax, lines, "KL to unsteered, nats per token", f"effect, {wish['unit']}")

    return on_white(svg(draw, f"Effect against price: {wish['title']}", height=3.0))


def on_white(drawing: str) -> str:
    """A drawing that is read on any ground."""
    return drawing.replace("</title>", '</title><rect width="100%" height="100%" fill="white"/>', 1) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="directory of the runs that data/ is cut from anew")
    if (given := parser.parse_args().runs) is not None:
        collect(given)
    for path in PAGES:
        path.write_text(drawn(path.read_text(encoding="utf-8")), encoding="utf-8")
    FIGURE.write_text(figure(), encoding="utf-8")
    DEMO_FIGURE.write_text(demo_figure(), encoding="utf-8")
