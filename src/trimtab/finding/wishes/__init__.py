"""Ways to state a wish, one file each."""

from trimtab.finding.wishes.contrast import Contrast
from trimtab.finding.wishes.task import TaskReward
from trimtab.finding.wishes.texts import Texts
from trimtab.finding.wishes.want import Want, WrittenPair
from trimtab.finding.wishes.wish import Wish
from trimtab.finding.wishes.words import Words

__all__ = ["Contrast", "TaskReward", "Texts", "Want", "Wish", "Words", "WrittenPair"]
