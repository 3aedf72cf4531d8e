"""Visual explanations of image classifiers: learned, attributed, evaluated."""

import lazy_loader

# Names are in __init__.pyi, each imported at its first use: Lightning takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
