"""The rewrite passes, one a file, and the pipeline that a config stands for."""

from qgraph.passes.quantize_activations import QuantizeActivations
from qgraph.passes.quantize_weights import QuantizeWeights
from qgraph.passes.share_quantizers import ShareQuantizers
from qgraph.passes.sparsify_weights import SparsifyWeights
from qgraph.pipeline import Pipeline

__all__ = ["QuantizeActivations", "QuantizeWeights", "ShareQuantizers", "SparsifyWeights", "default_pipeline"]

KNOWN = (SparsifyWeights, QuantizeWeights, QuantizeActivations, ShareQuantizers)


def default_pipeline() -> Pipeline:
    """The passes that `prepare` runs; each does what the config of its module asks for."""
    return Pipeline((SparsifyWeights(), QuantizeWeights(), QuantizeActivations(), ShareQuantizers()))
