"""Data modules: labelled images with the evidence of their labels."""

from datamodules.busi import BUSI
from datamodules.deeppcb import DeepPCB
from datamodules.image_table import ImageTable
from datamodules.phantom import Phantom
from datamodules.relabelled import Relabelled
from datamodules.rsna import RSNAPneumonia

__all__ = ["BUSI", "DeepPCB", "ImageTable", "Phantom", "RSNAPneumonia", "Relabelled"]
