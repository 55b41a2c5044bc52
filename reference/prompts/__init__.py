"""Where pictures are in a prompt, and prompts as tensors, family by family."""
