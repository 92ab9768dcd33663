"""Networks and converters of published weights, one family a file."""

from stvision.optional import mend_torchvision

mend_torchvision()  # before diffusers is first imported
