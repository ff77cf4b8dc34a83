"""What the heads share that call a loss with more than one level or image at once."""

import torch


class GathersLevels:
    """For a head that calls its losses once for all levels (SSD's: images) instead of once for each.

    mmdet's ``loss_by_feat`` makes the targets, then calls ``loss_by_feat_single`` level by level and collects what that
    returns. A head of this kind has the latter return, in place of the class loss, a tuple of what the losses are to be
    called with: tensors, and ``avg_factor`` last; ``loss_by_feat`` then joins those of all levels and calls
    :meth:`losses` with them, once.
    """

    join = staticmethod(torch.cat)  # of the same tensor of all levels

    def loss_by_feat(self, *args, **kwargs):
        """The losses of the batch, as :meth:`losses` gives them."""
        *tensors, avg_factors = zip(*super().loss_by_feat(*args, **kwargs)["loss_cls"], strict=True)
        return self.losses(*map(self.join, tensors), avg_factors[0])

    def losses(self, *inputs):
        """The dict of losses of the batch, from the joined tensors and ``avg_factor``."""
        raise NotImplementedError(f"{type(self).__name__} gathers levels, but has no method losses.")
