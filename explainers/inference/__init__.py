"""What leaves the lab: one module from an image to what, how sure and where; its exports."""

from explainers.inference.bundle import OUTPUTS, Answer, Bundle, Explanation

__all__ = ["OUTPUTS", "Answer", "Bundle", "Explanation"]
