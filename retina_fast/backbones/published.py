"""Published weights, from torch hub's folder or from the network, without a word of code from their files."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models._api import WeightsEnum

from retina_fast.data.errors import UserError
from retina_fast.data.files import damage


def load_published_weights(network: nn.Module, weights: WeightsEnum | None, progress: bool) -> None:
    """Load torchvision's weights into their network; torchvision downloads what is not in torch hub's folder.

    torchvision would unpickle the file with all that it names. Here it is read as weights only, so no code of it runs.

    Args:
        network: a model or a backbone, as torchvision builds it for the weights.
        weights: None leaves the network as it is.
        progress: whether to show a progress bar while downloading.

    Raises:
        ConnectionError: if they cannot be downloaded; the message says where to put them.
        UserError: if their file is damaged, or holds something else; the message names it and says what to do.

    Example::

        >>> from torchvision.models import ResNet18_Weights, resnet18
        >>> load_published_weights(resnet18(), ResNet18_Weights.IMAGENET1K_V1, progress=False)  # doctest: +SKIP
    """
    if weights is None:
        return
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    broken = damage(file) if file.exists() else None
    try:
        if broken:
            raise ValueError(broken)
        network.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True, weights_only=True))
    except OSError as error:  # urllib's errors are of this class, too
        raise ConnectionError(
            f"the weights {weights} could not be downloaded ({getattr(error, 'reason', error)}): put the file into "
            "torch.hub.get_dir()/checkpoints by hand, or build with weights=None, weights_backbone=None"
        ) from error
    except Exception as error:  # A damaged file makes the unpickler raise anything.
        reason = broken or f"{error}\n".splitlines()[0]
        raise UserError(
            f"{file}: damaged, or not the weights {weights} ({reason}): delete it, and it is downloaded again, or put "
            "a whole copy in its place"
        ) from error
