"""Training: one loop, one file a task; run as ``accelerate launch -m stvision.train.<task>``."""

from stvision.optional import mend_torchvision

mend_torchvision()  # before diffusers is first imported

#: task -> (module, one line of help)
TASKS: dict[str, tuple[str, str]] = {
    "vae": ("stvision.train.vae", "image autoencoder on single frames"),
    "image": ("stvision.train.image", "text-to-image diffusion on single frames"),
    "seer": ("stvision.train.seer", "video prediction by inflating an image U-Net"),
    "action": ("stvision.train.action", "classifier that names the task a clip shows"),
    "classify": ("stvision.train.classify", "video classifier around any backbone"),
    "cache": ("stvision.train.cache", "compute frames, latents and text states once"),
}
