"""Contenders, one file each: what takes activations apart, and is held against the others.

Importing a file registers its kinds.
"""

# ruff: noqa: F401
from trimtab.evaluation.supervised.contenders.bases import principal_components, random_directions
from trimtab.evaluation.supervised.contenders.codes import supervised_codes
from trimtab.evaluation.supervised.contenders.contender import KINDS, Contender, Ground, make_contenders
from trimtab.evaluation.supervised.contenders.dictionaries import frozen_decoder, own, task_saes
from trimtab.evaluation.supervised.contenders.rotation import learned_rotation
from trimtab.evaluation.supervised.contenders.text_saes import saes_of_text
