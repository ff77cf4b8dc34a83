"""What is in a data set, and which losses the study gives reason to try on it.

``detloss advise DATA`` prints it. From Python::

    advice = advise(describe(read_labels("data.yaml")))
    for choice in advice.choices:
        print(choice.row.label, choice.as_yaml, choice.mean("AP"), choice.better)
"""

from detloss_plugins.advice.advice import Advice, Choice, advise
from detloss_plugins.advice.describe import Description, describe
from detloss_plugins.advice.labels import Labels, LabelsError, read_labels
from detloss_plugins.advice.rules import SCENARIOS, scenarios

__all__ = [
    "SCENARIOS",
    "Advice",
    "Choice",
    "Description",
    "Labels",
    "LabelsError",
    "advise",
    "describe",
    "read_labels",
    "scenarios",
]
