"""One file a job: a readable story of numbered steps, in the manner of diffusers."""

from stvision.optional import mend_torchvision

mend_torchvision()  # before diffusers is first imported
