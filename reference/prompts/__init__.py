"""Where pictures are in a prompt, and prompts as tensors, family by family.

chat_collator    conversations to a batch: labels, padding, what a text or a picture must be
answers          where a conversation's answers are among its tokens, by its chat template
processors       the processor of any family: stock with torchvision, else one of these two
qwen_processing  Qwen2-VL's and Qwen2.5-VL's, videos included
other_processors the others', images alone
layouts, grids   where a family's prompts have vision, as coordinates
"""

import transformers  # noqa: F401  # its import registers the students, which needs this package's modules whole
