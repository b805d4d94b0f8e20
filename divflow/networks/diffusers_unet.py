"""The UNet of Hugging Face's diffusers as a field."""

import inspect
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from divflow.networks.conditioning import NetworkError, zero_initialize
from divflow.networks.images import image_shape

__all__ = ["DiffusersUNet"]

# Embeddings of classes, which a field is not given, and of times that are whole numbers or not zero.
_NO_FIELD = {"class_embed_type", "num_class_embeds", "time_embedding_type", "num_train_timesteps"}


class DiffusersUNet(nn.Module):
    """The UNet of Hugging Face's diffusers, `UNet2DModel`, called as `net(t, x)`.

        net(t, x) = UNet2DModel(x, time_scale * t).sample

    Needs `pip install "divflow[diffusers]"`. The attribute `model` is the `UNet2DModel`, whose weights can be loaded or saved.

    diffusers embeds times by waves of up to 1 radian a step, in float32. Its schedulers take 1000 steps for a unit of time, so waves
    reach 1000 radians. If nothing pretrained is loaded, a lower `time_scale` saves solvers evaluations (see
    `SinusoidalEmbedding`), and in float64 allows tolerances below 1e-5.

    Divergence: normalization and attention let every pixel see all others, so `Exact` takes D products. Use `Hutchinson` for all but
    small images.

    Args:
        event_shape: `(channels, height, width)`.
        block_out_channels: channels of each level, from full resolution to the lowest.
        down_block_types: diffusers' names of the blocks on the way down, one a level.
        up_block_types: names of those on the way up, from the lowest level.
        layers_per_block: residual layers of each block.
        norm_num_groups: groups of each normalization; must divide all numbers of channels.
        attention_head_dim: channels of an attention head; must divide the channels of levels with attention.
        time_scale: steps of diffusers' time in a unit of the field's time.
        zero_init: start with a last layer of zeros, so that the field vanishes and a flow is the identity.
        options: further arguments of `UNet2DModel`, by name.

    Shape:
        t `()` or `(k,)`, x `(k, channels, height, width)`; returns x's shape.

    Raises:
        NetworkError: diffusers is not installed, the event does not fit the levels, or `UNet2DModel` refuses the
            arguments; in a call, a context is given, which this network does not take.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        block_out_channels: Sequence[int] = (32, 64),
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D"),
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        attention_head_dim: int = 8,
        time_scale: float = 1000.0,
        zero_init: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape(event_shape, len(block_out_channels), "DiffusersUNet")
        try:
            from diffusers import UNet2DModel  # here, since it takes seconds and is not required
        except ImportError as error:
            raise NetworkError(
                f'DiffusersUNet needs diffusers ({error}). Install it: pip install "divflow[diffusers]", or use UNet'
            ) from error
        arguments = {
            "sample_size": (height, width),
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": tuple(block_out_channels),
            "down_block_types": tuple(down_block_types),
            "up_block_types": tuple(up_block_types),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
        }
        options = dict(options or {})
        # UNet2DModel ignores unknown names.
        possible = set(inspect.signature(UNet2DModel).parameters) - set(arguments) - _NO_FIELD
        if set(options) - possible:
            raise NetworkError(
                f"options {sorted(set(options) - possible)} can't be handed to UNet2DModel. Use the arguments of "
                f"DiffusersUNet, or any of {sorted(possible)}"
            )
        try:
            # diffusers declares a placeholder for the class, which is no module.
            self.model = cast(nn.Module, UNet2DModel(**arguments, **options))
        except ValueError as error:
            raise NetworkError(f"diffusers' UNet2DModel refused its arguments: {error}") from error
        self.time_scale = time_scale
        if zero_init:
            zero_initialize(self.model.get_submodule("conv_out"))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The network's value at (t, x); see the class for the shapes."""
        if context is not None:
            raise NetworkError(
                f"DiffusersUNet takes no context, but got one of shape {tuple(context.shape)}. Use UNet with context_features"
            )
        if x.shape[0] == 0:
            return x.clone()  # diffusers' attention can't reshape an empty batch
        return self.model(x, self.time_scale * t.to(x.device)).sample
