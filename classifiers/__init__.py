"""The classifiers that are explained: a plain network and the module that trains it."""

from classifiers.classifier import Classifier
from classifiers.network import Network, load_network
from classifiers.optimisation import Optimisation

__all__ = ["Classifier", "Network", "Optimisation", "load_network"]
