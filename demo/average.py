"""`python -m demo.average MODEL... --output FILE`: the mean of the weights of several model files of one network.

Runs with a common beginning end in one basin of the loss, whose middle generalises better than any of them (Izmailov
et al. 2018, https://arxiv.org/abs/1803.05407; Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from retina_fast import checkpoint
from retina_fast.checkpoint import Checkpoint
from retina_fast.data.errors import UserError


def average(models: list[Checkpoint]) -> Checkpoint:
    """The last model with the mean of all their weights and BatchNorm statistics.

    Raises:
        UserError: if the models are of different networks or classes.
    """
    last = models[-1]
    for model in models:
        if (model.builder, model.classes) != (last.builder, last.classes):
            raise UserError(f"a {model.builder} of {model.classes} and a {last.builder} of {last.classes} have no mean")
    mean = {
        name: torch.stack([model.state_dict[name].double() for model in models]).mean(dim=0).to(value.dtype)
        for name, value in last.state_dict.items()
    }
    return replace(last, state_dict=mean)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint.save(average([checkpoint.load(model) for model in arguments.models]), arguments.output)
