"""Where pictures are in a prompt, and prompts as tensors, family by family."""

import transformers  # noqa: F401  # its import registers the students, which needs this package's modules whole
