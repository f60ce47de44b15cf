"""torchvision's classifiers as `torchvision:NAME`, without pre-trained weights, at the input their weights expect.

torchvision imports torch's compiler, seconds of work, and is therefore imported when one of them is asked for.
"""

from __future__ import annotations

import functools
from typing import Any

from ptsim import zoo
from ptsim.errors import UnknownNameError, UsageError


def classifier_names() -> list[str]:
    """Every classification model that this torchvision registers."""
    import torchvision

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _entry(name: str) -> zoo.ModelEntry:
    import torchvision

    if name not in classifier_names():
        raise UnknownNameError("torchvision model", name, classifier_names())
    weights = torchvision.models.get_model_weights(name).DEFAULT
    size = weights.transforms().crop_size[0]
    if name.startswith("vit_"):  # their images have one size, the constructor's; vit_h_14's newest weights are for 518
        size = 224

    def build(*, num_classes: int, **kwargs: Any) -> Any:
        try:
            return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
        except (TypeError, ValueError) as error:
            raise UsageError(f"torchvision:{name} cannot be built: {error}") from error

    if name in ("inception_v3", "googlenet"):  # their own initialisation takes a minute and warns that it does
        build = functools.partial(build, init_weights=False)
    return zoo.ModelEntry(f"torchvision:{name}", build, (3, size, size), len(weights.meta["categories"]))


zoo.register_family("torchvision", _entry)
