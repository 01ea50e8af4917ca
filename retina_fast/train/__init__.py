"""Training: `train` runs what `TrainSettings` describes, on one machine or several."""

from retina_fast.train.run import train
from retina_fast.train.settings import TrainSettings
from retina_fast.train.stopping import Stopped

__all__ = ["Stopped", "TrainSettings", "train"]
