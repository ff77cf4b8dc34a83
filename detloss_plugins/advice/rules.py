"""Which scenario of the study a data set is like. The rules are few, and each says in words why it holds."""

from collections.abc import Callable
from typing import NamedTuple

from detloss_plugins.advice.describe import CROWDED_IOU, Description

__all__ = ["RULES", "SCENARIOS", "Rule", "scenarios"]

TAIL = 20  # objects of the largest class for one of the smallest
TINY_SHARE = 0.5
MANY = 10  # objects in an image
OVERLAPPED = 0.1
FAULTY = 0.01


class Rule(NamedTuple):
    """A scenario, when a data set is like it, and why, in words with the data set's figures."""

    scenario: str
    holds: Callable[[Description], bool]
    why: Callable[[Description], str]


# The first that hold come first in the advice. "trees" and "plain" are what is left.
RULES = (
    Rule(
        "long-tail",
        lambda found: found.imbalance >= TAIL,
        lambda found: f"the largest class has {found.imbalance:.0f} times the objects of the smallest ({TAIL} or more)",
    ),
    Rule(
        "small",
        lambda found: found.tiny >= TINY_SHARE,
        lambda found: f"{found.tiny:.0%} of the objects have less than 16 x 16 pixels at a size of {found.size} "
        f"({TINY_SHARE:.0%} or more)",
    ),
    Rule(
        "crowded",
        lambda found: found.per_image[0] >= MANY or found.crowded >= OVERLAPPED,
        lambda found: (
            f"an image has {found.per_image[0]:.1f} objects ({MANY} or more)"
            if found.per_image[0] >= MANY
            else f"{found.crowded:.0%} of the objects have a neighbour at an IoU above {CROWDED_IOU} ({OVERLAPPED:.0%} "
            "or more)"
        ),
    ),
    Rule(
        "noisy",
        lambda found: found.faulty >= FAULTY,
        lambda found: f"{found.faulty:.1%} of the labels are faulty ({FAULTY:.0%} or more); wrong classes and inexact "
        "boxes cannot be seen from here, so give --scenario noisy if you know of them",
    ),
    Rule(
        "trees",
        lambda found: len(found.counts) == 1 and found.objects > 0,
        lambda found: "one class, as of the tree crowns, the study's only photographs",
    ),
)
PLAIN = Rule("plain", lambda found: True, lambda found: "every data set is, so what the study says of it comes last")
SCENARIOS = tuple(rule.scenario for rule in (*RULES, PLAIN))


def scenarios(found: Description) -> dict[str, str]:
    """``{scenario: why}`` of those that a data set is like; the plain one comes last, always."""
    return {rule.scenario: rule.why(found) for rule in (*RULES, PLAIN) if rule.holds(found)}
