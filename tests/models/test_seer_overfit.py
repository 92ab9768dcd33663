"""Proof (g): the temporal layers and the decomposer can learn a few clips by heart."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from stvision.models.fstext import FSTextDecomposer
from stvision.models.seer import SeerUNetModel


@pytest.mark.slow
@pytest.mark.parametrize("temporal", ["transformer", "swap"])
def test_g_four_tiny_clips_are_overfitted_within_500_steps(temporal: str) -> None:
    torch.manual_seed(0)
    unet = SeerUNetModel.from_unet2d(
        UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            norm_num_groups=8,
            attention_head_dim=4,
        ),
        temporal=temporal,
    )
    fstext = FSTextDecomposer(dim=32, num_layers=1, num_heads=4, max_frames=4, max_tokens=8)
    # a square that moves by the sentence's direction, from one reference frame
    clips = torch.zeros(4, 4, 4, 8, 8)
    for clip, (dy, dx) in enumerate([(0, 1), (1, 0), (0, -1), (-1, 0)]):
        for frame in range(4):
            y, x = 3 + dy * frame, 3 + dx * frame
            clips[clip, :, frame, y : y + 2, x : x + 2] = 2.0
    text = torch.randn(4, 5, 32)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    # the image part was never pretrained here, so it learns too
    parameters = [*unet.parameters(), *fstext.parameters()]
    optimizer = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    losses = []
    for _ in range(500):
        noise = torch.randn_like(clips[:, :, 1:])
        time = torch.randint(0, 1000, (4,))
        noisy = scheduler.add_noise(clips[:, :, 1:], noise, time)
        sample = torch.cat((clips[:, :, :1], noisy), dim=2)
        predicted = unet(sample, time, fstext(text, 4), cond_frames=1).sample[:, :, 1:]
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = sum(losses[-50:]) / 50
    print(f"{temporal}: noise MSE {last:.4f}")
    assert last < 0.1, f"noise MSE {last:.3f} after 500 steps"
