"""The mean loss of an epoch, summed on the device: nothing waits for it before the epoch ends."""

from __future__ import annotations

import torch
from torch import Tensor

_FOLD = 256  # losses that are kept one by one before they are summed


class LossSum:
    """Losses of one epoch, each weighted with its number of images."""

    def __init__(self, device: torch.device, loss_sum: float = 0.0, num_images: float = 0.0) -> None:
        """Begins with a sum of losses over so many images."""
        self._device = device
        self._told: list[tuple[Tensor, int]] = []
        self._sum = torch.tensor(loss_sum, dtype=torch.float64, device=device)  # Σ loss · images
        self._images = num_images

    def add(self, loss: Tensor, num_images: int) -> None:
        """The mean loss over so many images; a copy is kept, because loops reduce or scale theirs in place."""
        self._told.append((loss.detach().clone(), num_images))
        if len(self._told) == _FOLD:
            self._fold()

    def total(self, num_images: int) -> Tensor:
        """(Σ loss · images, images of those losses, `num_images`) in float64, for a sum over the ranks."""
        self._fold()
        counts = torch.tensor([self._images, num_images], dtype=torch.float64, device=self._device)
        return torch.cat((self._sum.view(1), counts))

    def _fold(self) -> None:
        if self._told:
            values = torch.stack([loss.to(self._device).double() for loss, _ in self._told])
            # As numbers the weights travel with the kernel; a tensor of them would be a copy, which waits for a GPU.
            weights = [float(weight) for _, weight in self._told]
            self._sum += torch.stack(torch._foreach_mul(list(values.unbind()), weights)).sum()
            self._images += sum(weight for _, weight in self._told)
            self._told.clear()
