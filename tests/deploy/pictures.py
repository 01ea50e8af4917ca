"""Small images that the tests of the engine share."""

import torch


def images(*sizes, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return [image.float() / 255 for image in made] if dtype == torch.float32 else made


def floats(images):
    return [image.float() / 255 for image in images]
