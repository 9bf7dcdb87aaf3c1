"""`trimtab find`: read a wish, load a model and its SAEs, find the features, and write a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trimtab.dictionaries.saes_config import SAEsConfig
from trimtab.errors import UserError
from trimtab.finding.examples import check_enough
from trimtab.finding.finding import COMMAND, by_site, find_in
from trimtab.finding.neutral import read_neutral_prompts
from trimtab.finding.options import FindOptions
from trimtab.finding.result import Found
from trimtab.finding.wishes import Contrast, TaskReward, Texts, Want, Wish, Words
from trimtab.finding.wishes.files import read_labelled, read_rows, read_sides, read_texts
from trimtab.finding.wishes.texts import TEXT_TOKENS
from trimtab.lm import LanguageModel
from trimtab.runs import Run, SourceName, config_directory, part_of
from trimtab.tasks import TaskConfig

WISH = {"heading": ""}
"""Metadata of options that stand at the top of the help."""
_NOT_THE_RESULT = ("run", "any_model")


@dataclass(frozen=True, kw_only=True)
class FindConfig(FindOptions, SAEsConfig):
    """Find the features that bring a wish about, prove it on examples that chose nothing, and show the alternatives."""

    needs = ("decode", "prefix")

    want: str | None = field(default=None, metadata=WISH)
    """The wish in words ("the sea, ships and sailors"): the model writes texts that show it, and others."""
    wanted: Path | None = field(default=None, metadata=WISH)
    """File of texts that have the property, one a line; or JSONL of text and wanted (true or false), for both kinds."""
    unwanted: Path | None = field(default=None, metadata=WISH)
    """File of texts that don't."""
    contrast: Path | None = field(default=None, metadata=WISH)
    """JSONL of prompt (a text, or chat turns), wanted and unwanted answer."""
    more: tuple[str, ...] = field(default=(), metadata=WISH)
    """Words to be likelier behind the prompts that --prompt names."""
    less: tuple[str, ...] = field(default=(), metadata=WISH)
    """Words to be less likely behind the prompts that --prompt names."""
    prompt: Path | None = field(default=None, metadata=WISH)
    """File of prompts for words, one a line."""
    task: str | None = None
    """Task whose reward is wished for, or module:Class of your own."""
    data: Path | None = None
    """Directory of the official files of the task."""
    task_option: tuple[SourceName, ...] = ()
    """Options of the task's loader, each NAME=VALUE."""
    items: int = 96
    """Training items of the task that are used at most."""
    instruction: tuple[str, ...] = ()
    """Instructions that prompting tries beside the others."""
    chat: bool = False
    """Put prompts of contrasts and words into the model's chat template, as one user turn."""
    text_tokens: int = TEXT_TOKENS
    """Tokens of each text that are read; longer ones are cut."""
    neutral: Path | None = None
    """JSON with neutral prompts, `validation` to choose on and `held_out` to report on; by default those shipped."""
    run: Path | None = None
    """Directory to write; by default one under runs/, named after this config."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {
            "--want": self.want, "--wanted": self.wanted, "--contrast": self.contrast, "--task": self.task,
            "--more or --less": self.more or self.less,
        }  # fmt: skip
        given = [name for name, value in kinds.items() if value]
        if len(given) != 1:
            why = f"{' and '.join(given)} are given" if given else "there is none"
            raise UserError("the wish", why, f"give one of {', '.join(kinds)}")
        if bool(self.prompt) != bool(self.more or self.less):
            raise UserError("--prompt", "words need prompts, and nothing else does", "give it with --more or --less")
        if self.unwanted and not self.wanted:
            raise UserError("--unwanted", "there are no wanted texts", "give --wanted, too")
        if self.wanted and not self.unwanted and self.wanted.suffix != ".jsonl":
            why = "there are no unwanted texts beside it"
            raise UserError(f"--wanted {self.wanted}", why, "give --unwanted, too, or one .jsonl file of both kinds")

    def wish(self, model: LanguageModel) -> Wish:
        """What is wished for; a task's reward needs the model's tokenizer.

        Raises:
            UserError: as for `stated`, or the task cannot be loaded.
        """
        if (stated := self.stated()) is not None:
            return stated
        assert self.task is not None
        task = TaskConfig(task=self.task, data=self.data, task_option=self.task_option).load_task(model.tokenizer)
        return TaskReward(task=task, items=self.items, seed=self.seed, instruction=self.instruction)

    def stated(self) -> Wish | None:
        """The wish that files and words state, for which no model is needed; None for a task's reward.

        Raises:
            UserError: a file cannot be read, or holds something else.
        """
        if self.want is not None:
            return Want(text=self.want, text_tokens=self.text_tokens, seed=self.seed, instruction=self.instruction)
        if self.contrast is not None:
            return Contrast(rows=read_rows(self.contrast), chat=self.chat, instruction=self.instruction)
        if self.wanted is not None:
            if self.unwanted is None:
                wanted, unwanted = read_labelled(self.wanted)
            else:
                wanted, unwanted = read_sides(self.wanted, self.unwanted)
            return Texts(wanted=wanted, unwanted=unwanted, text_tokens=self.text_tokens, instruction=self.instruction)
        if self.prompt is not None:
            prompts = read_texts(self.prompt)
            return Words(prompts=prompts, more=self.more, less=self.less, chat=self.chat, instruction=self.instruction)
        return None


def run_find(config: FindConfig) -> Found:
    """What `trimtab find` does; a run that is done is read back.

    Raises:
        UserError: anything that the user named is wrong; see `find`.
    """
    prompts = read_neutral_prompts(config.neutral)
    wish = config.stated()
    if wish is not None and wish.most is not None:
        check_enough(wish.most, config.examples)
    model = config.load_model()
    saes = config.load_saes(model)
    wish = wish or config.wish(model)
    directory = config.run or config_directory(COMMAND, config, ignore=_NOT_THE_RESULT)
    with Run.open(
        directory, COMMAND, config, seeds=[config.seed], device=config.device, ignore_fields=_NOT_THE_RESULT
    ) as run:
        return find_in(run, model, by_site(model, saes), wish, prompts, FindOptions(**part_of(config, FindOptions)))
