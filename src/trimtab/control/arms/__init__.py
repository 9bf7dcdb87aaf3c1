"""Arms, one file each: how it is chosen or trained, and what answers the items.

Importing a file registers its kind, in the order in which comparisons show them.
"""

# ruff: noqa: F401
# isort: off
from trimtab.control.arms.random_features import RandomFeatures
from trimtab.control.arms.random_allowed import RandomAllowed
from trimtab.control.arms.most_active import MostActive
from trimtab.control.arms.static import BestStatic
from trimtab.control.arms.gated_static import GatedStatic
from trimtab.control.arms.corrsteer import CorrSteer
from trimtab.control.arms.vector import Vector
from trimtab.control.arms.lora import Lora
from trimtab.control.arms.prompting import Prompting
from trimtab.control.arms.letters import Letters
# isort: on
