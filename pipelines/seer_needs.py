"""Bytes of activations that the parts of ``SeerPipeline`` need, counted on fake tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, long

from stvision.pipelines.memory import MemoryPlan, vae_tiles


@dataclass(frozen=True)
class CallSizes:
    """Sizes of a call.

    Args:
        height: pixels.
        width: pixels.
        num_frames: frames of one window.
        batch_size: videos made at once.
        text_length: tokens a sentence.
    """

    height: int
    width: int
    num_frames: int
    batch_size: int
    text_length: int


def seer_needs(
    fstext: Any,
    unet: Any,
    vae: Any,
    plan: MemoryPlan,
    sizes: CallSizes,
    counted: Callable[..., int],
) -> dict[str, int]:
    """Bytes of activations of the text decomposer, the denoiser and the VAE, in their own dtypes.

    Args:
        fstext: text decomposer.
        unet: denoiser.
        vae: image VAE.
        plan: settings of the call.
        sizes: of the call.
        counted: ``counted(name, run, *settings)`` counts ``run``, or remembers it by the settings.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    h, w = sizes.height // factor, sizes.width // factor
    length, text_dim = sizes.text_length, fstext.config.dim
    batch, num_frames = sizes.batch_size, sizes.num_frames
    branches = batch * (2 if plan.batch_guidance else 1)
    frames = num_frames * batch
    chunk = frames if plan.vae_chunk is None else min(plan.vae_chunk, frames)

    def inputs(zeros: Callable[..., Tensor], model: Any, *shape: int) -> Tensor:
        return zeros(*shape, dtype=model.dtype, device=model.device)

    def text(zeros: Callable[..., Tensor]) -> Any:
        states = inputs(zeros, fstext, batch, length, text_dim)
        return type(fstext).forward(fstext, states, num_frames)

    def step(zeros: Callable[..., Tensor]) -> Any:
        sample = inputs(zeros, unet, branches, unet.config.in_channels, num_frames, h, w)
        states = inputs(zeros, unet, branches, num_frames, length, text_dim)
        time = zeros((), dtype=long, device=unet.device)
        # The class's own forward: graphs or offload hooks on the instance stay out of it.
        return type(unet).forward(unet, sample, time, states, cond_frames=1)

    def decode(zeros: Callable[..., Tensor]) -> Any:
        latents = inputs(zeros, vae, chunk, vae.config.latent_channels, h, w)
        with vae_tiles(vae, plan.vae_tiling):
            return vae.decode(latents).sample

    # Decoded frames of a window stay while the VAE works on the rest.
    kept = frames * 3 * sizes.height * sizes.width * vae.dtype.itemsize
    return {
        "fstext": counted("fstext", text, batch, num_frames, length),
        "unet": counted("unet", step, branches, num_frames, h, w, length),
        "vae": counted("vae", decode, chunk, h, w, plan.vae_tiling) + kept,
    }
