"""Pictures of losses, drawn from the registered classes alone: value and gradient over what suits the family.

``detloss show NAME --plot FILE`` and the gallery of the site draw with these functions. A picture is a few panels.
"""

from detloss_plugins.cli._plot.figures import figure, panel_figures, save, thumbnail
from detloss_plugins.cli._plot.panels import COLOURS, GREY, Panel, panels_of, tidy

__all__ = ["COLOURS", "GREY", "Panel", "figure", "panel_figures", "panels_of", "save", "thumbnail", "tidy"]
