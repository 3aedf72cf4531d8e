from .classifier import Classifier
from .network import Network, load_network
from .optimisation import Optimisation

__all__ = ["Classifier", "Network", "Optimisation", "load_network"]
