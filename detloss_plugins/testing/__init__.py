"""Tools to test a loss, ours or anybody's: input for it, the promises it keeps, whether it equals its counterparts."""

from detloss_plugins.testing.check import check_loss, checks, instances
from detloss_plugins.testing.parity import compare, verdict
from detloss_plugins.testing.samples import sample

__all__ = ["check_loss", "checks", "compare", "instances", "sample", "verdict"]
