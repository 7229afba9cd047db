"""Hand-written models, one trap of graph capture each."""

from tests.zoo.traps import forwards, products, transforms
from tests.zoo.traps.registry import TRAPS

__all__ = ["TRAPS", "forwards", "products", "transforms"]
