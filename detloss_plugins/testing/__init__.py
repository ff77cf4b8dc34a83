"""Tools to test a loss, ours or anybody's: the promises it keeps, and whether it equals an upstream counterpart."""

from detloss_plugins.testing.check import check_loss, checks, instances
from detloss_plugins.testing.parity import compare, verdict

__all__ = ["check_loss", "checks", "compare", "instances", "verdict"]
