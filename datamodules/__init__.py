"""Data modules: labelled images with the evidence of their labels."""

from datamodules.busi import BUSI
from datamodules.chestxray14 import ChestXray14
from datamodules.chexlocalize import CheXlocalize
from datamodules.deeppcb import DeepPCB
from datamodules.image_table import ImageTable
from datamodules.isic import ISIC2018
from datamodules.phantom import Phantom
from datamodules.relabelled import Relabelled
from datamodules.rsna import RSNAPneumonia
from datamodules.shards import Shards
from datamodules.siim import SIIMPneumothorax
from datamodules.vindr import VinDrCXR

__all__ = [
    "BUSI",
    "ISIC2018",
    "CheXlocalize",
    "ChestXray14",
    "DeepPCB",
    "ImageTable",
    "Phantom",
    "RSNAPneumonia",
    "Relabelled",
    "SIIMPneumothorax",
    "Shards",
    "VinDrCXR",
]
