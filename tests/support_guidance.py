"""Tiny video U-Nets with random weights, and a sampling pipeline around them."""

import torch
from diffusers import DDIMScheduler, UNetMotionModel


def tiny_motion_unet(seed: int = 0, **options) -> UNetMotionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "norm_num_groups": 2,
    }
    return UNetMotionModel(**{**config, **options}).eval()


class TinyPipeline:
    """The part of a diffusers video pipeline that guidance meets: U-Net, scheduler, the loop."""

    def __init__(self, unet, scheduler=None) -> None:
        self.unet = unet
        self.scheduler = scheduler or DDIMScheduler(num_train_timesteps=100)
        self.guided = True
        self.batched = True
        self.dtype = next(unet.parameters()).dtype
        self.dim = 8
        self.text_per_frame = isinstance(unet, UNetMotionModel)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guided

    @torch.no_grad()
    def __call__(self, steps=5, frames=4, batch=1, size=(8, 8), strength=1.0, seed=0, fail_at=None):
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(batch, 4, frames, *size, generator=generator).to(self.dtype)
        text = torch.randn(2, batch, 3, self.dim, generator=generator).to(self.dtype)
        if self.text_per_frame:
            text = text.repeat_interleave(frames, dim=1)
        self.scheduler.set_timesteps(steps)
        times = self.scheduler.timesteps[steps - int(steps * strength) :]
        for index, time in enumerate(times):
            if index == fail_at:
                raise KeyboardInterrupt
            if self.guided and self.batched:
                out = self.unet(
                    torch.cat([latents] * 2), time, encoder_hidden_states=text.flatten(0, 1)
                ).sample
                first, second = out.chunk(2)
            elif self.guided:
                first, second = (
                    self.unet(latents, time, encoder_hidden_states=t).sample for t in text
                )
            else:
                second = self.unet(latents, time, encoder_hidden_states=text[1]).sample
                first = second
            latents = self.scheduler.step(first + 3 * (second - first), time, latents).prev_sample
        return latents


def snapshot(pipe):
    modules = {}
    for name, module in pipe.unet.named_modules():
        modules[name] = (
            module,
            getattr(module, "processor", None),
            tuple(sorted(vars(module))),
            len(module._forward_pre_hooks),
            len(module._forward_pre_hooks_with_kwargs),
        )
    return modules, sorted(vars(pipe)), sorted(vars(pipe.scheduler)), pipe.unet.training


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, state in before[0].items():
        assert state[0] is after[0][name][0]
        assert state[1] is after[0][name][1]
        assert state[2:] == after[0][name][2:]
    assert before[1:] == after[1:]
