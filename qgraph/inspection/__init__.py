"""Looking at models: a summary layer by layer, the captured graphs as text and as networkx graphs."""

from qgraph.inspection.layers import FloatTensor, Layer, Totals
from qgraph.inspection.summary import Inspection, inspect

__all__ = ["FloatTensor", "Inspection", "Layer", "Totals", "inspect"]
