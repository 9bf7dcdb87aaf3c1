"""What features are: windows of text in which each of them fires, and all about one of them."""

from trimtab.features.collecting import ExampleOptions, examples, examples_of_harvest, examples_of_text
from trimtab.features.command import FeatureConfig, run_feature
from trimtab.features.examples_command import ExamplesConfig, ExamplesResult, run_examples
from trimtab.features.profile import FeatureProfile, FeatureProfiles, ProfileOptions, feature

__all__ = [
    "ExampleOptions",
    "ExamplesConfig",
    "ExamplesResult",
    "FeatureConfig",
    "FeatureProfile",
    "FeatureProfiles",
    "ProfileOptions",
    "examples",
    "examples_of_harvest",
    "examples_of_text",
    "feature",
    "run_examples",
    "run_feature",
]
